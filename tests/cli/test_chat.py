"""`phimlx chat` through a pipe, and how a chat is set up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from phimlx.cli.group import cli
from phimlx.errors import GenerationError
from phimlx.terminal.conversation import Conversation
from tests.terminal.fake_phi import FakePhi, Script


class Piped:
    """Runs `phimlx chat` on lines of stdin with a scripted model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.phi = FakePhi(Script(["One", ".\x1b"]), "# Two", "Three\n")
        self.sources: list[Any] = []
        monkeypatch.setattr("phimlx.api.load", self._load)

    def _load(self, source: Any = None, adapter: Any = None, dtype: Any = None) -> FakePhi:
        self.sources.append(source)
        return self.phi

    def __call__(self, *arguments: str, lines: str | bytes) -> Result:
        return CliRunner().invoke(cli, ["chat", *arguments], input=lines)


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Piped:
    return Piped(monkeypatch)


def test_each_line_is_a_turn_and_replies_are_raw(chat: Piped) -> None:
    result = chat("--model", "nano", lines="a\n\n/set temp 0\r\nb \nc")
    assert (result.exit_code, result.stdout) == (0, "One.\n# Two\nThree\n")
    assert result.stderr == "temp  0.0\n"
    assert chat.sources == ["nano"]
    assert [prompt[-1]["content"] for prompt in chat.phi.prompts] == ["a", "b", "c"]
    assert [options.get("temperature") for options in chat.phi.options] == [None, 0.0, 0.0]


@pytest.mark.parametrize(("flags", "bits"), [([], None), (["--kv-bits", "4"], 4)])
def test_what_the_cache_is_made_with(chat: Piped, flags: list[str], bits: int | None) -> None:
    chat(*flags, lines="a\n")
    assert chat.phi.kv_bits == bits
    assert "kv_bits" not in chat.phi.options[0]  # which the cache says


def test_the_first_error_ends_it(chat: Piped) -> None:
    chat.phi = FakePhi("One.", GenerationError("The prompt has 200 tokens.", "Say less."))
    result = chat(lines="a\nb\nc\n")
    assert (result.exit_code, result.stdout) == (1, "One.\n")
    assert result.stderr == "Error: The prompt has 200 tokens.\nHint: Say less.\n"


def test_a_line_that_is_no_text_is_named(chat: Piped) -> None:
    result = chat(lines=b"a\n\xff\n")
    assert (result.exit_code, result.stdout) == (1, "One.\n")
    assert result.stderr == "Error: Line 2 of what was piped in is not UTF-8 text.\n"


def test_a_saved_chat_goes_on_with_its_model(chat: Piped, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    chat("--model", "nano", "--system", "Be brief.", "--seed", "1", lines=f"a\n/save {path}\n")
    saved = Conversation.load(path)
    assert saved.model == "nano"
    assert saved.system == "Be brief."
    result = chat("--load", str(path), "--temp", "0.5", lines="b\n/save\n")
    assert (result.exit_code, result.stderr) == (0, f"Saved to {path}.\n")
    assert chat.sources == ["nano", "nano"]
    assert chat.phi.prompts[1] == [*saved.messages, {"role": "user", "content": "b"}]
    assert chat.phi.options[1]["seed"] == 1
    assert Conversation.load(path).settings == {"seed": 1, "temperature": 0.5}
    chat("--load", str(path), "--model", str(tmp_path), lines="c\n/save\n")
    assert chat.sources[2] == str(tmp_path)
    assert Conversation.load(path).model == str(tmp_path)


def test_a_saved_chat_that_is_damaged_is_said_first(chat: Piped, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text("{}")
    result = chat("--load", str(path), lines="a\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {path} is not a saved chat.\n"
    assert chat.sources == []


def test_a_pipe_agrees_to_no_address_of_a_saved_chat(chat: Piped, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    part = {"type": "image", "path": "https://pictures.example/cat.png", "sha256": "0"}
    Conversation("nano", [{"role": "user", "content": [part]}]).save(path)
    result = chat("--load", str(path), lines="y\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: {path} shows {part['path']}, which is fetched only where somebody agrees to it.\n"
        "Hint: Load it on a terminal, which asks, or begin a new chat.\n"
    )
    assert chat.sources == []


def test_tools_are_read_before_the_model(chat: Piped, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text("[]")
    result = chat("--tools", str(path), lines="a\n")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {path} holds no tools.\n")
    assert chat.sources == []
