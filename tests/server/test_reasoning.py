"""Whether a reply begins with thought, in each dialect, of a model that leaves it open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phimlx.api import Phi, load
from tests.reasoning_vision import reasoning_vision_folder
from tests.server.running import Running, running

MESSAGES = [{"role": "user", "content": "What?"}]
FLAGS = ("auto", "on", "off")


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reasoning_vision_folder(data, tmp_path_factory.mktemp("open") / "")


@pytest.fixture(scope="module")
def open_model(folder: Path) -> Iterator[Running]:
    with running(model=str(folder)) as started:
        yield started


@pytest.fixture(scope="module")
def prompts(folder: Path) -> dict[str, int]:
    """Tokens of the prompt in each mode, which tell the modes apart."""
    phi: Phi = load(folder)
    found = {flag: len(phi.encode(MESSAGES, reasoning=flag)) for flag in FLAGS}
    assert len(set(found.values())) > 1
    return found


DIALECTS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "openai": ("/v1/chat/completions", {"max_tokens": 1}, ("usage", "prompt_tokens")),
    "anthropic": ("/v1/messages/count_tokens", {}, ("input_tokens",)),
    "ollama": ("/api/chat", {"stream": False, "options": {"num_predict": 1}},
               ("prompt_eval_count",)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("dialect", "given", "flag"),
    [
        ("openai", {}, "auto"),
        ("openai", {"reasoning_effort": "high"}, "on"),
        ("openai", {"reasoning_effort": "none"}, "off"),
        ("anthropic", {}, "off"),
        ("anthropic", {"thinking": {"type": "disabled"}}, "off"),
        ("anthropic", {"thinking": {"type": "adaptive"}}, "auto"),
        ("anthropic", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "on"),
        ("ollama", {}, "auto"),
        ("ollama", {"think": False}, "off"),
        ("ollama", {"think": True}, "on"),
    ],
)
def test_a_choice_reaches_the_prompt(
    open_model: Running, prompts: dict[str, int], dialect: str, given: dict[str, Any], flag: str
) -> None:
    path, usual, place = DIALECTS[dialect]
    name = open_model.app.service.models.list()[0].name
    answer = open_model.post(path, {"model": name, "messages": MESSAGES, **usual, **given})
    assert answer.status_code == 200, answer.text
    found: Any = answer.json()
    for key in place:
        found = found[key]
    assert found == prompts[flag]


def test_ollamas_programs_are_told_of_what_the_folder_says(open_model: Running) -> None:
    name = open_model.app.service.models.list()[0].name
    capabilities = open_model.post("/api/show", {"model": name}).json()["capabilities"]
    assert "thinking" in capabilities
