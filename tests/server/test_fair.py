"""Fairness and equality: nobody waits for another's prompt, and company changes no answer."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import mlx.core as mx
import pytest

from phimlx.api import Phi
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.generation import prefill, prompts, scheduler
from phimlx.generation.engine import Engine
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from tests.everything import EVERYTHING
from tests.server.running import LONG, SECONDS, Running
from tests.server.test_guard import wait_until

PATH = "/v1/chat/completions"
MODEL = Path(__file__).parents[1] / "goldens" / "models" / "phi-4"
PIECE = 512
LONG_PROMPT = 20_000 if EVERYTHING else 4_000


@pytest.mark.slow
def test_a_long_prompt_delays_others_by_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prefill, prompts, scheduler):
        monkeypatch.setattr(module, "prefill_tokens", lambda: PIECE)
    model = load_model(Checkpoint(MODEL), mx.float32)
    passes: list[tuple[int, ...]] = []
    compute = type(model).hidden_states

    def hidden_states(self: Any, tokens: mx.array, *args: Any, **more: Any) -> mx.array:
        passes.append(tokens.shape)
        return compute(self, tokens, *args, **more)

    monkeypatch.setattr(type(model), "hidden_states", hidden_states)
    engine = Engine(model, memory=1 << 40)
    short = [Request([9 + n] * 5, Sampler(Sampling(), n), 200) for n in range(3)]
    engine.add(*short[:2])
    for _ in range(4):
        engine.step()
    long = Request([7 + n % 200 for n in range(LONG_PROMPT)], Sampler(Sampling(), 0), 2)
    engine.add(long)
    engine.step()
    engine.add(short[2])
    pieces = waited = 0
    while not long.reply.tokens:
        passes.clear()
        told = {request for request, _ in engine.step()}
        assert {short[0], short[1]} <= told  # a token each, whatever the step computes beside
        assert sum(1 for _, length in passes if length > 1) <= 1
        assert all(rows * length <= PIECE for rows, length in passes)
        pieces += any(length > 1 for _, length in passes)
        waited += not short[2].reply.tokens
    assert waited <= 3  # a piece of the long prompt, its own, and its first pass
    assert pieces >= LONG_PROMPT // PIECE


def ask(number: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Tell me a story of {number} birds."}]
    return {"model": "nano", "messages": messages, "max_tokens": 48, **more}


def said(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.1, "seed": 11}])
def test_an_answer_is_the_same_among_fifteen_others(
    server: Running, nano: Phi, options: dict[str, Any]
) -> None:
    body = ask(0, **options)
    expected = nano.generate(body["messages"], max_tokens=48, **options).text
    assert said(server.post(PATH, body)) == expected
    others = [
        ask(n, temperature=n % 3 / 2, seed=n, max_tokens=20 + 4 * n, frequency_penalty=n % 2 / 2)
        for n in range(1, 16)
    ]
    for place in (0, 7, 15):
        bodies = [*others[:place], body, *others[place:]]
        with ThreadPoolExecutor(16) as threads:
            answers = list(threads.map(lambda each: server.post(PATH, each), bodies))
        assert [answer.status_code for answer in answers] == [200] * 16
        assert said(answers[place]) == expected


@contextmanager
def process(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `phimlx serve` for the block; the process, and its address."""
    command = [sys.executable, "-m", "phimlx", "serve", "--port", "0", "--model", "nano", *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            assert started.stdout is not None
            line = started.stdout.readline()
            assert line.startswith("Serving at http://127.0.0.1:"), line
            yield started, line.split()[2].partition("/v1")[0]
        finally:
            started.kill()


def refuses(url: str) -> bool:
    """Whether nobody listens there any more."""
    where = urlsplit(url)
    try:
        connection = socket.create_connection((where.hostname, where.port), SECONDS)
    except OSError:
        return True
    connection.close()
    return False


@pytest.mark.slow
@pytest.mark.parametrize("grace", ["300", "0.001"])
def test_sigterm_lets_finish_what_runs_within_the_grace_time(grace: str) -> None:
    with process("--grace", grace) as (server, url):
        text, refused = begin_and_signal(server, url, [signal.SIGTERM])
        assert server.wait(SECONDS) == 0
    assert refused
    assert text.rstrip().endswith("data: [DONE]")
    assert ("shutting_down" in text) == (grace != "300")


@pytest.mark.slow
def test_sigint_twice_stops_at_once() -> None:
    with process() as (server, url):
        text, refused = begin_and_signal(server, url, [signal.SIGINT] * 2, n=8)
        assert server.wait(SECONDS) == 0
        assert server.stderr is not None
        assert "Traceback" not in server.stderr.read()
    assert refused
    assert "shutting_down" in text


def begin_and_signal(
    server: subprocess.Popen[str], url: str, signals: list[signal.Signals], **more: Any
) -> tuple[str, bool]:
    """Send signals while a reply is streamed; what came of it, and whether others are refused."""
    with (
        httpx2.Client(base_url=url, timeout=SECONDS, trust_env=False) as client,
        client.stream("POST", PATH, json={**LONG, "n": 2, "stream": True, **more}) as answer,
    ):
        lines = answer.iter_lines()
        text = [next(lines)]
        for each in signals:
            server.send_signal(each)
            wait_until(lambda: refuses(url))  # the second signal would be lost in the first
        with suppress(httpx2.HTTPError):
            text += lines
    return "\n".join(text), refuses(url)
