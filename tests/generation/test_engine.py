"""The engine: caches kept between calls change nothing, and stopping early leaves them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.generation import prefill
from phimlx.generation.engine import Engine
from phimlx.generation.prompt_cache import PromptCache
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.models.base import CausalLM

FOLDER = Path(__file__).parents[1] / "goldens" / "models" / "mini-step-32"
STEP = 32


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(Checkpoint(FOLDER), mx.float32)


def prompt_of(length: int, start: int = 4) -> list[int]:
    return [start + (7 * i) % 240 for i in range(length)]


def request_of(prompt: list[int], count: int, cache: PromptCache | None = None) -> Request:
    return Request(prompt, Sampler(Sampling(), 0), count, cache=cache)


def greedy(
    model: CausalLM, prompt: list[int], count: int, cache: PromptCache | None = None
) -> list[int]:
    return read(model, request_of(prompt, count, cache))


def read(model: CausalLM, request: Request) -> list[int]:
    tokens = [chunk.token for chunk in Engine(model).run(request)]
    assert tokens == request.reply.tokens
    return request.reply.tokens


def plain(model: CausalLM, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding by a whole forward pass for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(mx.array([tokens]))[0, -1].argmax().item()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("length", [1, 10, 31, 32, 33, 60])
def test_decoding_equals_whole_passes(model: CausalLM, length: int) -> None:
    assert greedy(model, prompt_of(length), 24) == plain(model, prompt_of(length), 24)


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_prefill_in_pieces(model: CausalLM, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "prefill_tokens", lambda: chunk)
    for length in (20, 50):
        assert greedy(model, prompt_of(length), 20) == plain(model, prompt_of(length), 20)


def test_turns_prefill_only_what_is_new(model: CausalLM) -> None:
    cache, tokens, computed = PromptCache(model), prompt_of(8), []

    def report(_: int, to_compute: int) -> None:
        computed.append(to_compute)

    for new in (3, 3, 9, 3, 3):
        expected = plain(model, tokens, 5)
        request = Request(tokens, Sampler(Sampling(), 0), 5, cache=cache, on_prefill=report)
        reply = read(model, request)
        assert reply == expected
        tokens = tokens + reply + prompt_of(new, start=100)
    # Prompts of 8, 16, 24, 38 and 46 tokens: 38 needs the long table, so all is computed anew.
    assert computed == [8, 4, 4, 38, 4]


def test_going_back_below_the_step(model: CausalLM) -> None:
    """A shorter prompt after a longer one (undo, another question) uses the short table again."""
    cache, long = PromptCache(model), prompt_of(50)
    greedy(model, long, 10, cache)
    assert greedy(model, long[:20], 6, cache) == plain(model, long[:20], 6)
    assert greedy(model, long[:45], 6, cache) == plain(model, long[:45], 6)


@pytest.mark.parametrize("length", [10, 29, 31])
@pytest.mark.parametrize("taken", [0, 1, 2, 4])
def test_stopping_early_leaves_a_usable_cache(model: CausalLM, length: int, taken: int) -> None:
    cache, prompt = PromptCache(model), prompt_of(length)
    request = request_of(prompt, 20, cache)
    chunks = Engine(model).run(request)
    said = [next(chunks).token for _ in range(taken)]
    chunks.close()
    assert request.reply.tokens == said
    fed = prompt + said if taken else []
    # The token that crosses the step waits for all before it to be computed again.
    assert cache.tokens == (fed[:STEP] if len(fed) == STEP + 1 else fed)
    assert request.computed == len(cache.tokens)
    following = prompt + said + prompt_of(2, start=50)
    assert greedy(model, following, 6, cache) == plain(model, following, 6)


def test_an_error_in_the_middle_leaves_a_usable_cache(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, prompt = PromptCache(model), prompt_of(12)
    assert greedy(model, prompt, 4, cache) == plain(model, prompt, 4)
    longer = prompt_of(24)
    attend, calls = cache.kv.attend, []

    def interrupted(layer: int, *arrays: Any) -> mx.array:
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attend(layer, *arrays)

    monkeypatch.setattr(cache.kv, "attend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        greedy(model, longer, 4, cache)
    monkeypatch.undo()
    assert greedy(model, longer, 6, cache) == plain(model, longer, 6)


def test_sampled_tokens_depend_on_the_seed_alone(model: CausalLM) -> None:
    def sample(seed: int, cache: PromptCache) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, top_k=20), seed)
        return read(model, Request(prompt_of(25), sampler, 15, cache=cache))

    warm = PromptCache(model)
    first = sample(5, warm)
    assert sample(5, warm) == first
    assert sample(5, PromptCache(model)) == first
    assert sample(6, warm) != first


def test_requests_are_stepped_together(model: CausalLM) -> None:
    """Prompts on both sides of the LongRoPE step, replies of several lengths, one joins late."""
    engine = Engine(model)
    prompts = [prompt_of(10), prompt_of(29, start=9), prompt_of(50), prompt_of(5, start=30)]
    requests = [request_of(prompt, 4 + 2 * row) for row, prompt in enumerate(prompts)]
    for request in requests[:3]:
        engine.add(request)
    heard: dict[Request, list[int | None]] = {request: [] for request in requests}
    for step in range(20):
        if step == 3:
            engine.add(requests[3])
        for request, chunk in engine.step():
            heard[request].append(chunk.token)
    for request in requests:
        assert heard[request] == request.reply.tokens
        assert request.reply.tokens == plain(model, request.prompt, request.max_tokens)
        assert request.reply.finish_reason == "length"
    assert engine.step() == []


def test_nobody_waits_for_another_prompt(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "prefill_tokens", lambda: 8 * prefill.SHARES)
    engine = Engine(model)
    first, second = request_of(prompt_of(6), 30), request_of(prompt_of(60), 3)
    engine.add(first)
    engine.step()
    engine.add(second)
    for _ in range(7):  # the pieces of the second prompt, the last of which gives a token
        assert [request for request, _ in engine.step()] == [first]
    assert {request for request, _ in engine.step()} == {first, second}
    while not (first.finished and second.finished):
        engine.step()
    assert first.reply.tokens == plain(model, first.prompt, 30)
    assert second.reply.tokens == plain(model, second.prompt, 3)


def test_a_request_that_is_cancelled_leaves_the_others(model: CausalLM) -> None:
    engine = Engine(model)
    first, second, third = (request_of(prompt_of(9, start), 12) for start in (4, 5, 6))
    engine.add(first)
    engine.add(second, third)
    for _ in range(4):
        engine.step()
    for cancelled in (first, second, second):
        engine.cancel(cancelled)
    while not third.finished:
        assert {request for request, _ in engine.step()} <= {third}
    assert third.reply.tokens == plain(model, third.prompt, 12)
    for request in (first, second):
        assert request.reply.finish_reason == "cancelled"
        assert request.reply.tokens == plain(model, request.prompt, 12)[:4]


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_row_may_be_cancelled_at_any_step(model: CausalLM, before: int) -> None:
    engine = Engine(model)
    requests = [request_of(prompt_of(9, start), 5) for start in (4, 5, 6)]
    engine.add(*requests)
    for _ in range(before):
        engine.step()
    engine.cancel(requests[1])
    while not (requests[0].finished and requests[2].finished):
        engine.step()
    for request in (requests[0], requests[2]):
        assert request.reply.tokens == plain(model, request.prompt, 5)
