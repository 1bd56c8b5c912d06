"""Which models are in memory: beside each other where they fit, and never less than are used."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from phimlx.api import Phi
from phimlx.errors import SettingsError
from phimlx.options import from_flags, to_flags
from phimlx.server import models
from phimlx.server.served import Served, list_served
from phimlx.server.settings import ServerSettings
from tests.server.running import LONG, Running, running
from tests.server.test_guard import wait_until

PATH = "/v1/chat/completions"
BOTH = ("nano", "nano-multimodal")


def ask(model: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "What is 2 plus 3?"}]
    return {"model": model, "messages": messages, "max_tokens": 4, "temperature": 0, **more}


def loaded(server: Running) -> list[str]:
    return [each.served.name for each in server.app.service.models.loaded]


@pytest.fixture
def sizes() -> dict[str, int]:
    """Forecasts, by name."""
    found = {model.name: model.forecast.total for model in list_served(ServerSettings())}
    return {name: found[name] for name in BOTH}


def test_a_forecast_has_weights_and_a_share_for_the_cache(sizes: dict[str, int]) -> None:
    nano = next(model for model in list_served(ServerSettings()) if model.name == "nano")
    assert nano.forecast.cache == 1024 * 2 * 4 * 4 * 32 * 2  # 4 layers, 4 heads of 32, 16 bits
    assert sizes["nano"] > nano.nbytes + nano.forecast.cache


def test_models_that_fit_stay_beside_each_other(
    sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "machine_memory", lambda: sum(sizes.values()))
    with running() as server:
        for name in BOTH * 2:
            assert server.post(PATH, ask(name)).json()["model"] == name
        assert loaded(server) == list(BOTH)
        limits = [each.phi.engine._scheduler._memory for each in server.app.service.models.loaded]
        shares = [each.served.forecast.cache for each in server.app.service.models.loaded]
        assert limits == shares


def test_the_one_used_longest_ago_goes(
    sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "machine_memory", lambda: sum(sizes.values()) - 1)
    with running() as server:
        for name in (*BOTH, "nano"):
            assert server.post(PATH, ask(name)).json()["model"] == name
            assert loaded(server) == [name]


def test_one_in_use_is_never_unloaded(
    sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch, nano: Phi
) -> None:
    monkeypatch.setattr(models, "machine_memory", lambda: sum(sizes.values()) - 1)
    options = {name: value for name, value in LONG.items() if name not in ("model", "messages")}
    expected = nano.generate(LONG["messages"], **options)
    assert len(expected.tokens) == 900
    with running() as server, ThreadPoolExecutor(1) as thread:
        service = server.app.service
        begun = thread.submit(server.post, PATH, LONG)
        wait_until(lambda: bool(service.models.loaded) and service.models.loaded[0].users == 1)
        refused = server.post(PATH, ask("nano-multimodal"))
        answer = begun.result()
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert "do not fit beside nano, in use" in refused.json()["error"]["message"]
        assert answer.json()["choices"][0]["message"]["content"] == expected.text
        assert server.post(PATH, ask("nano-multimodal")).status_code == 200


def test_loading_one_loses_no_request_of_another(nano: Phi) -> None:
    bodies = [
        ask(BOTH[number % 3 == 1], max_tokens=40, temperature=1.2, seed=number)
        for number in range(12)
    ]
    with running() as server, ThreadPoolExecutor(len(bodies)) as threads:
        answers = list(threads.map(lambda body: server.post(PATH, body), bodies))
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == 200
        if body["model"] == "nano":
            options = {name: body[name] for name in ("max_tokens", "temperature", "seed")}
            expected = nano.generate(body["messages"], **options).text
            assert answer.json()["choices"][0]["message"]["content"] == expected


def test_a_load_that_fails_leaves_the_others(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: Any, served: Served, base: Any) -> Phi:
        raise RuntimeError("[malloc] Unable to allocate 9000 bytes.")

    with running() as own:
        assert own.post(PATH, ask("nano")).status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(models.Models, "_read", read)
            answer = own.post(PATH, ask("nano-multimodal"))
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "out_of_memory"
        assert loaded(own) == ["nano"]
        assert own.post(PATH, ask("nano-multimodal")).status_code == 200


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5m", 300.0), ("0", 0.0), ("-1", math.inf), ("300", 300.0), ("1h30m", 5400.0),
        ("0.5", 0.5), ("10s", 10.0), ("-5m", math.inf), ("inf", math.inf),
    ],
)  # fmt: skip
def test_how_long_a_model_stays_is_read(text: str, seconds: float) -> None:
    settings = from_flags(ServerSettings, {"keep_alive": text})
    assert settings.keep_alive == seconds
    flag, value = to_flags(settings)
    assert flag == "--keep-alive"
    assert from_flags(ServerSettings, {"keep_alive": value}) == settings


@pytest.mark.parametrize("text", ["", "m", "5 m", "five", "nan", "5m5"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(SettingsError, match="it must be seconds, a time such as 5m"):
        from_flags(ServerSettings, {"keep_alive": text})


@pytest.mark.parametrize("keep_alive", [0.0, 0.01])
def test_one_that_nobody_uses_goes(keep_alive: float) -> None:
    with running(keep_alive=keep_alive) as server:
        assert server.post(PATH, ask("nano")).status_code == 200
        gone: Callable[[], bool] = lambda: loaded(server) == []  # noqa: E731
        wait_until(gone)
        assert server.post(PATH, ask("nano")).status_code == 200
