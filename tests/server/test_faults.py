"""Faults that are injected: what each ends, and that the next request is answered."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import pytest

from phimlx.api import Phi
from phimlx.generation.reply import ReplyReader
from phimlx.generation.sampler import Sampler
from phimlx.generation.stop import StopStrings
from phimlx.server import app
from tests.server.running import SECONDS, Running, running
from tests.server.test_guard import wait_until

PATH = "/v1/chat/completions"


def ask(number: int = 0, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Tell me a story of {number} birds."}]
    body = {"model": "nano", "messages": messages, "max_tokens": 40, "temperature": 1.1}
    return {**body, "seed": number, **more}


def said(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def alone(nano: Phi, body: dict[str, Any]) -> str:
    options = {name: body[name] for name in ("max_tokens", "temperature", "seed")}
    return nano.generate(body["messages"], **options).text


def failing_sampler(patch: pytest.MonkeyPatch) -> None:
    draw = Sampler.draw

    def broken(self: Sampler, logits: mx.array) -> mx.array:
        if self.seed == 3:
            raise ZeroDivisionError("a secret")
        return draw(self, logits)

    patch.setattr(Sampler, "draw", broken)


def failing_stops(patch: pytest.MonkeyPatch) -> None:
    feed = StopStrings.feed

    def broken(self: StopStrings, text: str) -> str:
        if "fault" in self.stops:
            raise ZeroDivisionError("a secret")
        return feed(self, text)

    patch.setattr(StopStrings, "feed", broken)


def failing_end(patch: pytest.MonkeyPatch) -> None:
    finish = ReplyReader.finish

    def broken(self: ReplyReader) -> Any:
        if "fault" in self._stops.stops:
            raise ZeroDivisionError("a secret")
        return finish(self)

    patch.setattr(ReplyReader, "finish", broken)


@pytest.mark.parametrize("fault", [failing_sampler, failing_stops, failing_end])
@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_one_request_is_its_own(
    nano: Phi,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
    stream: bool,
) -> None:
    bodies = [ask(number) for number in range(5)]
    bodies[3] |= {"stop": ["fault"], "stream": stream}
    expected = [alone(nano, body) for body in bodies]
    with running() as server, monkeypatch.context() as patch:
        fault(patch)
        with ThreadPoolExecutor(5) as threads:
            answers = list(threads.map(lambda body: server.post(PATH, body), bodies))
        bad = answers.pop(3)
        assert [said(answer) for answer in answers] == expected[:3] + expected[4:]
        assert bad.status_code == (200 if stream else 500)
        assert '"code":"internal_error"' in bad.text
        assert "secret" not in bad.text
        assert 'finish_reason="error"' in server.client.get("/metrics").text
        assert server.client.get("/health").json()["restarts"] == 0


def test_where_memory_is_short_the_newest_are_told_to_come_again(
    nano: Phi, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [ask(number) for number in range(6)]
    expected = [alone(nano, body) for body in bodies]
    with running() as server:
        assert said(server.post(PATH, bodies[0])) == expected[0]
        [loaded] = server.app.service.models.loaded
        loaded.phi.engine.forget_prefixes()
        kind = type(loaded.phi.model)
        compute = kind.hidden_states
        failed = iter(range(2))  # what is kept goes the first time

        def full(self: Any, tokens: mx.array, *args: Any, **more: Any) -> mx.array:
            if tokens.shape == (6, 1) and next(failed, None) is not None:
                raise RuntimeError("[malloc] Unable to allocate 9000 bytes.")
            return compute(self, tokens, *args, **more)

        with monkeypatch.context() as patch, ThreadPoolExecutor(6) as threads:
            patch.setattr(kind, "hidden_states", full)
            answers = list(threads.map(lambda body: server.post(PATH, body), bodies))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 1 <= len(refused) <= 3
        for answer in refused:
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "out_of_memory"
            assert int(answer.headers["retry-after"]) > 0
        for answer, text in zip(answers, expected, strict=True):
            if answer not in refused:
                assert said(answer) == text
        assert said(server.post(PATH, bodies[1])) == expected[1]


def test_a_worker_that_dies_is_started_again_with_its_models(
    nano: Phi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "SWEEP_SECONDS", 0.05)
    body = ask()
    with running() as server:
        assert said(server.post(PATH, body)) == alone(nano, body)
        worker = server.app.service.worker
        before = server.app.service.models.loaded[0]

        def die() -> None:
            raise SystemExit

        with monkeypatch.context() as patch:
            patch.setattr(worker, "_fail", lambda *_: die())
            patch.setattr(before.phi.engine, "step", die)
            answer = server.post(PATH, body)
        assert answer.status_code == 500
        wait_until(lambda: bool(server.app.service.models.loaded))
        [after] = server.app.service.models.loaded
        assert after is not before
        assert said(server.post(PATH, body)) == alone(nano, body)
        health = server.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "ok")
        assert health.json()["restarts"] >= 1


def test_a_step_that_does_not_end_is_told(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    with running(step_seconds=0.1) as own, ThreadPoolExecutor(1) as thread:
        assert own.post(PATH, ask(max_tokens=2)).status_code == 200
        [loaded] = own.app.service.models.loaded
        step = loaded.phi.engine.step
        monkeypatch.setattr(loaded.phi.engine, "step", lambda: go_on.wait(SECONDS) and step())
        waiting = thread.submit(own.post, PATH, ask(max_tokens=2))
        wait_until(lambda: own.client.get("/health").status_code == 503)
        assert own.client.get("/health").json()["status"] == "stuck"
        go_on.set()
        assert waiting.result().status_code == 200
        assert own.client.get("/health").json()["status"] == "ok"
