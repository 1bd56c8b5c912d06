"""Adapters as names of models: each answers as it does alone, whoever shares its passes."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from phimlx.api import Phi, load
from phimlx.errors import CheckpointError, PhimlxError
from phimlx.server.app import App
from phimlx.server.served import list_served
from phimlx.server.settings import ServerSettings
from tests.server.adapters import write_adapter
from tests.server.running import Running, running
from tests.server.test_guard import wait_until

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Tell me a story."}]
COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, nano: Phi) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(folder / name, nano, seed) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Iterator[Running]:
    given = tuple(f"{name}={folder}" for name, folder in folders.items())
    with running(model="nano", adapters=given) as started:
        yield started


def ask(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": MESSAGES, "max_tokens": 24, "temperature": 0, **more}


def test_adapters_and_the_base_asked_at_once_say_what_each_says_alone(
    served: Running, folders: dict[str, Path]
) -> None:
    alone = {"nano": load("nano"), **{f"nano:{n}": load("nano", f) for n, f in folders.items()}}
    options: tuple[dict[str, Any], ...] = (
        {"temperature": 0},
        {"temperature": 1.2, "seed": 5},
        {"temperature": 0.8, "seed": 6, "frequency_penalty": 0.5},
    )
    asked = [(name, more) for name in alone for more in options] * 2
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda each: served.post(PATH, ask(each[0], **each[1])), asked))
    expected = [
        alone[name].generate(MESSAGES, **{"max_tokens": 24, **more}).text for name, more in asked
    ]
    found = [answer.json() for answer in answers]
    assert [each["choices"][0]["message"]["content"] for each in found] == expected
    assert [each["model"] for each in found] == [name for name, _ in asked]
    assert len(set(expected)) == len(alone) * len(options)


def test_adapters_are_listed_and_found(served: Running) -> None:
    listed = [model["id"] for model in served.client.get("/v1/models").json()["data"]]
    assert listed == ["nano", "nano:a", "nano:b"]
    assert served.client.get("/v1/models/nano:a").json()["id"] == "nano:a"
    for name in ("phi-4-nano:b", "NANO:B"):
        assert served.post(PATH, ask(name)).json()["model"] == "nano:b"
    answer = served.post(PATH, ask("nano:c"))
    assert answer.status_code == 404
    assert "There are: nano, nano:a, nano:b." in answer.json()["error"]["message"]
    assert 'model="nano:b"' in served.client.get("/metrics").text


def test_one_that_is_not_used_is_deleted_and_the_base_stays(folders: dict[str, Path]) -> None:
    with running(model="nano", adapters=(f"a={folders['a']}",)) as server:
        models = server.app.service.models
        body = {"model": "nano:a", "messages": MESSAGES, "keep_alive": 0, "stream": False}
        first = server.post("/api/chat", body | {"options": {"temperature": 0, "num_predict": 4}})
        assert first.status_code == 200
        wait_until(lambda: models.loaded[0].phi.adapters == ())
        assert [each.served.name for each in models.loaded] == ["nano"]
        assert server.post(PATH, ask("nano:a")).status_code == 200
        assert models.loaded[0].phi.adapters == ("a",)


def test_adapters_of_the_cache_are_those_of_the_models_they_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], nano: Phi
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for repository, base in (
        ("one--tune", "phi-4-nano"), ("two--tune", "nano"), ("three--other", "microsoft/phi-4"),
    ):  # fmt: skip
        home = tmp_path / f"models--{repository}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(COMMIT)
        folder = write_adapter(home / "snapshots" / COMMIT, nano, 1, base_model_name_or_path=base)
        assert folder.is_dir()
    served = list_served(ServerSettings(model="nano"))
    assert [model.name for model in served] == ["nano", "nano:tune", "nano:two.tune"]
    assert served[1].is_called("one/tune")
    assert [model.name for model in list_served(ServerSettings(adapters=("x=two/tune",)))] == [
        "nano", "nano-multimodal", "nano:x", "nano:tune", "nano:two.tune",
    ]  # fmt: skip
    with running(model="nano", adapters=()) as server:
        found = server.post(PATH, ask("one/tune")).json()
    expected = load("nano", folders["b"]).generate(MESSAGES, max_tokens=24, temperature=0).text
    assert found["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize(
    ("given", "model", "message"),
    [
        ("a", "nano", "--adapter 'a' names no adapter."),
        ("=x", "nano", "--adapter '=x' names no adapter."),
        ("a b=x", "nano", "--adapter 'a b=x' names no adapter."),
        ("nano:=x", "nano", "--adapter 'nano:=x' names no adapter."),
        ("a=/nowhere/at/all", "nano", "There is no adapter folder /nowhere/at/all."),
        ("phi-9:a={folder}", "nano", "is for no model here."),
        ("a={folder}", None, "does not say which model it is for."),
    ],
)
def test_one_that_cannot_be_is_told_at_the_start(
    folders: dict[str, Path], given: str, model: str | None, message: str
) -> None:
    settings = ServerSettings(model=model, adapters=(given.format(folder=folders["a"]),))
    with pytest.raises(PhimlxError) as caught:
        list_served(settings)
    assert message in str(caught.value)


def test_a_name_is_given_once(folders: dict[str, Path]) -> None:
    with pytest.raises(PhimlxError, match="there is a nano:a already"):
        list_served(ServerSettings(model="nano", adapters=(f"a={folders['a']}",) * 2))


def test_one_for_another_model_is_refused_when_the_server_starts(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders["a"], broken)
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")

    async def start() -> None:
        async with App(ServerSettings(model="nano", adapters=(f"a={broken}",))).started():
            pass

    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        asyncio.run(start())
