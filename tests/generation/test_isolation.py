"""Faults: one request's own ends that request, a pass's ends its rows, and the engine goes on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import ResourceError
from phimlx.generation import prefill, prompts, scheduler
from phimlx.generation.engine import Engine
from phimlx.generation.reply import Chunk
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.models.base import CausalLM

MODELS = Path(__file__).parents[1] / "goldens" / "models"
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1.0, top_k=20),
    Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.3),
    Sampling(frequency_penalty=0.5, logit_bias={7: 2.0}),
)
MALLOC = "[malloc] Unable to allocate 9000 bytes."


class FaultError(Exception):
    """What the tests inject."""


@pytest.fixture(scope="module", params=["mini-step-32"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return load_model(Checkpoint(MODELS / request.param), mx.float32)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prefill, scheduler, prompts):
        monkeypatch.setattr(module, "prefill_tokens", lambda: 16)


class OddTokens:
    """A grammar of odd tokens alone, which can be told to fail.

    Args:
        fails: the method that does, at its third call.
    """

    error = None

    def __init__(self, fails: str = "") -> None:
        self._fails, self._calls = fails, 0
        self.taken: list[int] = []

    def advance(self, tokens: Sequence[int]) -> None:
        self._call("advance")
        self.taken += tokens

    def restart(self, tokens: Sequence[int]) -> None:
        self.taken = list(tokens)

    def fitting(self, draft: Sequence[int]) -> list[int]:
        return []

    def allowed(self, vocab_size: int, draft: Sequence[int] = ()) -> np.ndarray:
        self._call("allowed")
        return np.tile(np.arange(vocab_size) % 2 == 1, (1 + len(draft), 1))

    def _call(self, name: str) -> None:
        self._calls += name == self._fails
        if self._calls == 3:
            raise FaultError


class Reader:
    """A reader of replies that fails at one of its methods."""

    parser = None
    stopped = False
    said = 0

    def __init__(self, fails: str) -> None:
        self._fails = fails

    def read(self, token: int) -> list[Any]:
        if self._fails == "read":
            raise FaultError
        return [Chunk("", token)]

    def finish(self) -> list[Any]:
        raise FaultError


def any_request(rng: random.Random, **more: Any) -> Request:
    prompt = [rng.randrange(4, 240) for _ in range(rng.choice([3, 14, 28, 31, 50]))]
    sampler = Sampler(rng.choice(SAMPLINGS), rng.randrange(99), prompt)
    return Request(prompt, sampler, rng.choice([7, 12, 20]), **more)


def alone(model: CausalLM, request: Request) -> list[int]:
    sampler = Sampler(request.sampler.sampling, request.sampler.seed, request.prompt)
    constraint: Any = None if request.constraint is None else OddTokens()
    other = Request(
        request.prompt, sampler, request.max_tokens, prompt_lookup=False, constraint=constraint
    )
    list(Engine(model).run(other))
    return other.reply.tokens


def run(engine: Engine, requests: list[Request]) -> None:
    engine.add(*requests)
    for _ in range(500):
        engine.step()
        if not engine.busy:
            return
    raise AssertionError("requests go on for ever")


def failing_sampler(request: Request) -> None:
    drawing = request.sampler.draw
    left = iter(range(3))

    def draw(logits: mx.array) -> mx.array:
        if next(left, None) is None:
            raise FaultError
        return drawing(logits)

    request.sampler.draw = draw  # type: ignore[method-assign]


def failing_reader(request: Request) -> None:
    request.reader = Reader("read")  # type: ignore[assignment]


def failing_end(request: Request) -> None:
    request.reader = Reader("finish")  # type: ignore[assignment]


def failing_mask(request: Request) -> None:
    request.constraint = OddTokens("allowed")  # type: ignore[assignment]


def failing_grammar(request: Request) -> None:
    request.constraint = OddTokens("advance")  # type: ignore[assignment]


def failing_listener(request: Request) -> None:
    def listen(done: int, whole: int) -> None:
        raise FaultError

    request.on_prefill = listen


def failing_start(request: Request) -> None:
    def start() -> None:
        raise FaultError

    request.start = start  # type: ignore[method-assign]


FAULTS = (
    failing_sampler, failing_reader, failing_end, failing_mask, failing_grammar, failing_listener,
    failing_start,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", [0, 2])
def test_a_fault_of_one_request_ends_it_alone(
    model: CausalLM, fault: Callable[[Request], None], place: int
) -> None:
    rng = random.Random(place)
    requests = [any_request(rng) for _ in range(4)]
    bad = requests[place]
    bad.max_tokens = 20
    bad.sampler = Sampler(SAMPLINGS[1], 5, bad.prompt)
    fault(bad)
    engine = Engine(model)
    run(engine, requests)
    assert isinstance(bad.error, FaultError)
    for request in requests:
        if request is not bad:
            assert request.error is None
            assert request.reply.tokens == alone(model, request)
    later = any_request(rng)
    run(engine, [later])
    assert later.reply.tokens == alone(model, later)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_request_that_is_alone_is_raised(
    model: CausalLM, fault: Callable[[Request], None]
) -> None:
    request = Request([5, 6, 7], Sampler(SAMPLINGS[1], 5), 20)
    fault(request)
    with pytest.raises(FaultError):
        list(Engine(model).run(request))


def fail_passes(
    monkeypatch: pytest.MonkeyPatch, model: CausalLM, numbers: Sequence[int], text: str
) -> None:
    """Let forward passes fail, counted from 0."""
    compute, calls = type(model).hidden_states, iter(range(10**6))

    def hidden_states(self: CausalLM, *args: Any, **more: Any) -> mx.array:
        if next(calls) in numbers:
            raise RuntimeError(text)
        return compute(self, *args, **more)

    monkeypatch.setattr(type(model), "hidden_states", hidden_states)


@pytest.mark.parametrize("number", [0, 1, 4, 9])
def test_a_pass_that_fails_ends_those_that_took_part(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    rng = random.Random(number)
    requests = [any_request(rng) for _ in range(6)]
    expected = [alone(model, request) for request in requests]
    engine = Engine(model, max_rows=3)
    with monkeypatch.context() as patch:
        fail_passes(patch, model, [number], "the device is gone")
        run(engine, requests)
    failed = [request for request in requests if request.error is not None]
    assert 1 <= len(failed) <= 3
    for request, tokens in zip(requests, expected, strict=True):
        if request in failed:
            assert isinstance(request.error, RuntimeError)
            assert request.reply.tokens == tokens[: len(request.reply.tokens)]
        else:
            assert request.reply.tokens == tokens


@pytest.mark.parametrize("number", [0, 2, 5, 8, 11])
@pytest.mark.parametrize("held", [False, True])
def test_where_memory_is_short_the_newest_go(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, number: int, held: bool
) -> None:
    """The others say what they say alone, whether their rows have been computed again or not."""
    rng = random.Random(number)
    requests = [any_request(rng) for _ in range(5)]
    if held:
        requests[0].constraint = OddTokens()  # type: ignore[assignment]
        requests[3].constraint = OddTokens()  # type: ignore[assignment]
    expected = [alone(model, request) for request in requests]
    engine = Engine(model, prefix_memory=0)
    with monkeypatch.context() as patch:
        fail_passes(patch, model, [number], MALLOC)
        run(engine, requests)
    failed = [request.error is not None for request in requests]
    assert 1 <= sum(failed) <= 3
    assert failed == sorted(failed)  # the last ones
    for request, tokens in zip(requests, expected, strict=True):
        if request.error is None:
            assert request.reply.tokens == tokens
        else:
            assert isinstance(request.error, ResourceError)


def test_what_is_kept_goes_before_any_request(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    engine = Engine(model)
    run(engine, [Request(list(range(20, 60)), Sampler(Sampling(), 0), 4)])
    assert engine.prefix_bytes > 0
    requests = [any_request(rng) for _ in range(4)]
    expected = [alone(model, request) for request in requests]
    with monkeypatch.context() as patch:
        fail_passes(patch, model, [6], MALLOC)
        run(engine, requests)
    assert [request.reply.tokens for request in requests] == expected


def test_an_engine_that_is_always_short_of_memory_ends_all_and_lives(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(2)
    engine = Engine(model)
    requests = [any_request(rng) for _ in range(5)]
    with monkeypatch.context() as patch:
        fail_passes(patch, model, range(10**6), MALLOC)
        run(engine, requests)
    assert all(isinstance(request.error, ResourceError) for request in requests)
    later = any_request(rng)
    run(engine, [later])
    assert later.reply.tokens == alone(model, later)
