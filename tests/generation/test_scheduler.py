"""Continuous batching: whoever joins and leaves, each request gets the reply that it gets alone."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import pytest

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import GenerationError
from phimlx.generation import prefill, prompts
from phimlx.generation.engine import Engine, Totals
from phimlx.generation.prompt_cache import PromptCache
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.machine.memory import cache_bytes_per_token
from phimlx.models.base import CausalLM

MODELS = Path(__file__).parents[1] / "goldens" / "models"
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1.0, top_k=20),
    Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.3),
    Sampling(frequency_penalty=0.5),
)


@pytest.fixture(scope="module", params=["mini-step-32", "mini-window", "phi-4"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return load_model(Checkpoint(MODELS / request.param), mx.float32)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prefill, prompts):
        monkeypatch.setattr(module, "prefill_tokens", lambda: 16)
    monkeypatch.setattr(prefill, "SHARES", 1)


def any_request(rng: random.Random) -> Request:
    length = rng.choice([1, 3, 14, 28, 31, 32, 33, 50])
    prompt = [rng.randrange(4, 240) for _ in range(length)]
    sampler = Sampler(rng.choice(SAMPLINGS), rng.randrange(99), prompt)
    return Request(prompt, sampler, rng.choice([1, 2, 7, 12, 20]))


def alone(model: CausalLM, request: Request) -> list[int]:
    sampler = Sampler(request.sampler.sampling, request.sampler.seed, request.prompt)
    other = Request(request.prompt, sampler, request.max_tokens, prompt_lookup=False)
    list(Engine(model).run(other))
    return other.reply.tokens


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_rows", [2, 16])
def test_requests_join_and_leave_at_any_step(model: CausalLM, seed: int, max_rows: int) -> None:
    """On either side of the LongRoPE step and across it; some are cancelled, or while they wait."""
    rng = random.Random(seed)
    engine = Engine(model, lambda tokens: 1.0, max_rows)
    arriving = sorted(((rng.randrange(30), any_request(rng)) for _ in range(9)), key=lambda a: a[0])
    cancelled = {rng.choice(arriving)[1]: rng.randrange(40) for _ in range(2)}
    heard: dict[Request, list[int | None]] = {request: [] for _, request in arriving}
    for step in range(600):
        for when, request in arriving:
            if when == step:
                engine.add(request)
        for request, when in cancelled.items():
            if when == step:
                engine.cancel(request)
        chunks = engine.step()
        assert len({request for request, _ in chunks}) <= max_rows
        for request, chunk in chunks:
            heard[request].append(chunk.token)
        if step > 40 and all(request.finished for _, request in arriving):
            break
    for _, request in arriving:
        expected = alone(model, request)
        assert heard[request] == request.reply.tokens
        if request in cancelled and request.reply.finish_reason == "cancelled":
            assert request.reply.tokens == expected[: len(request.reply.tokens)]
        else:
            assert request.reply.tokens == expected
            assert request.reply.finish_reason == "length"
    assert engine.step() == []


def test_memory_is_free_at_once_when_a_long_row_goes(model: CausalLM) -> None:
    engine = Engine(model)
    long, short = (Request([9] * n, Sampler(Sampling(), 0), 90) for n in (700, 5))
    engine.add(long)
    engine.add(short)
    for _ in range(60):
        engine.step()
    rows = engine._scheduler._rows
    assert rows is not None
    assert [rows._kv.row_lengths[1] > 700, len(rows.requests)] == [True, 2]
    engine.cancel(long)
    assert rows._kv.length < 100
    assert rows._kv.valid is None
    while not short.finished:
        engine.step()
    assert short.reply.tokens == alone(model, short)


def pieces(request: Request, into: list[Request]) -> Request:
    """Have each piece of a request's prompt noted."""
    request.on_prefill = lambda done, total: into.append(request)
    return request


@pytest.mark.parametrize("length", [3, 6, 12])
def test_short_prompts_do_not_wait_for_long_ones_nor_these_for_ever(
    model: CausalLM, length: int
) -> None:
    """Pieces are of 16 tokens: the first prompt's turn comes when others have had so many."""
    engine = Engine(model, prefix_memory=0)
    order: list[Request] = []
    long, second = (
        pieces(Request([9 + n] * 160, Sampler(Sampling(), 0), 4), order) for n in range(2)
    )
    engine.add(long, second)
    engine.step()
    engine.step()
    assert order == [long, long]
    turn = -(-16 // length)  # short ones between two pieces of the long one
    short: list[Request] = []
    for number in range(4 * turn):  # one more comes whenever one has been read
        short.append(pieces(Request([20 + number] * length, Sampler(Sampling(), 0), 2), order))
        engine.add(short[-1])
        while short[-1] not in order:
            engine.step()
    between = "".join("L" if each is long else "s" for each in order[2:])
    assert between == "L".join(["s" * turn] * 4)
    while engine.busy:
        engine.step()
    for request in (long, second, *short):
        assert request.reply.tokens == alone(model, request)


def test_pieces_are_short_while_others_wait(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "SHARES", 4)
    engine = Engine(model, prefix_memory=0)
    computed: list[int] = []
    first = Request([9] * 40, Sampler(Sampling(), 0), 40)
    first.on_prefill = lambda done, total: computed.append(done)
    engine.add(first)
    engine.step()
    assert computed == [16]
    other = Request([8] * 6, Sampler(Sampling(), 0), 4)
    engine.add(other)
    while not other.finished:
        engine.step()
    assert computed[:3] == [16, 20, 24]
    while engine.busy:
        engine.step()
    assert computed[-2:] == [32, 40]  # alone again, and the rest in one
    for request in (first, other):
        assert request.reply.tokens == alone(model, request)


def test_rows_are_decoded_at_every_step_while_others_are_read_or_read_again() -> None:
    """A row that crosses the LongRoPE step is computed again in pieces, as a prompt is."""
    model = load_model(Checkpoint(MODELS / "mini-step-32"), mx.float32)
    engine = Engine(model)
    crossing, steady = (Request([9 + n] * n, Sampler(Sampling(), 0), 40) for n in (30, 4))
    engine.add(crossing, steady)
    came: list[tuple[int, ...]] = []
    while not crossing.finished:
        chunks = engine.step()
        came.append(tuple(sum(who is each for who, _ in chunks) for each in (crossing, steady)))
    # Three tokens, then three pieces of 33 tokens, the last of which gives a token, too.
    first = came.index((1, 1))
    assert came[first : first + 8] == [(1, 1)] * 3 + [(0, 1)] * 2 + [(1, 1)] * 3
    while engine.busy:
        engine.step()
    assert crossing.reply.stats.cached_tokens == 0
    for request in (crossing, steady):
        assert request.reply.tokens == alone(model, request)


def test_a_row_that_crosses_alone_is_computed_again_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_model(Checkpoint(MODELS / "mini-step-32"), mx.float32)
    lengths: list[int] = []
    hidden_states = CausalLM.hidden_states

    def spy(self: CausalLM, input_ids: mx.array, *rest: object, **options: object) -> mx.array:
        lengths.append(input_ids.shape[1])
        return hidden_states(self, input_ids, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(CausalLM, "hidden_states", spy)
    request = Request([9] * 30, Sampler(Sampling(), 0), 8, prompt_lookup=False)
    list(Engine(model).run(request))
    assert lengths == [16, 14, 1, 1, 16, 16, 1, 1, 1, 1, 1]


def test_an_engine_tells_what_it_has_to_do(model: CausalLM) -> None:
    engine = Engine(model, max_rows=2)
    assert (engine.busy, engine.waiting, engine.running) == (False, 0, 0)
    requests = [Request([5 + n] * 7, Sampler(Sampling(), 0), 4) for n in range(3)]
    engine.add(*requests)
    assert (engine.busy, engine.waiting, engine.running) == (True, 3, 0)
    engine.step()
    assert (engine.waiting, engine.running) == (1, 2)
    engine.cancel(requests[2])
    assert (engine.waiting, engine.running) == (0, 2)
    while engine.busy:
        engine.step()
    assert engine.totals == Totals(2, 14, 0, 0, 8)


def test_what_does_not_fit_waits_and_what_never_fits_is_refused(model: CausalLM) -> None:
    per_token = cache_bytes_per_token(model.config, 4)
    engine = Engine(model, memory=100 * per_token)
    one, two, three = (Request([9 + n] * 30, Sampler(Sampling(), 0), 10) for n in range(3))
    engine.add(one, two, three)  # 40 columns each: two fit
    both = 0
    while not all(request.finished for request in (one, two, three)):
        rows = {request for request, _ in engine.step()}
        assert len(rows) <= 2
        both = max(both, len(rows))
    assert both == 2
    for request in (one, two, three):
        assert request.reply.tokens == alone(model, request)
    with pytest.raises(GenerationError) as caught:
        engine.add(Request([9] * 95, Sampler(Sampling(), 0), 10))
    assert "The prompt has 95 tokens, whose keys and values" in str(caught.value)
    assert caught.value.hint == "Shorten the prompt. It fits with kv_bits=8 (--kv-bits 8)."
    assert engine.step() == []


def test_a_reply_that_is_read_beside_the_batch(model: CausalLM) -> None:
    engine = Engine(model)
    shared = [Request([5 + n] * 7, Sampler(Sampling(), 0), 9) for n in range(2)]
    own = Request([6] * 9, Sampler(Sampling(), 0), 9)
    engine.add(*shared)
    read = []
    for chunk in engine.run(own):
        read.append(chunk.token)
        assert own not in {request for request, _ in engine.step()}
    while not all(request.finished for request in shared):
        engine.step()
    for request in (*shared, own):
        assert request.reply.tokens == alone(model, request)
    assert read == own.reply.tokens
    cached = Request([5], Sampler(Sampling(), 0), 1, cache=PromptCache(model))
    with pytest.raises(ValueError, match="no prompt caches"):
        engine.add(cached)


def test_a_row_that_is_alone_drafts_until_another_comes(model: CausalLM) -> None:
    engine = Engine(model, lambda tokens: 1.0)
    first = Request([4, 15, 26, 37, 48] * 6, Sampler(Sampling(), 0), 60)
    second = Request([7, 8, 9], Sampler(Sampling(), 0), 30)
    engine.add(first)
    for step in range(200):
        if step == 12:
            engine.add(second)
        engine.step()
    assert first.reply.tokens == alone(model, first)
    assert second.reply.tokens == alone(model, second)


def test_an_error_of_the_machine_ends_all_who_took_part(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model)
    requests = [Request([5 + n] * 7, Sampler(Sampling(), 0), 9) for n in range(2)]
    engine.add(*requests)
    engine.step()
    engine.step()

    def full(*_: object, **__: object) -> mx.array:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "hidden_states", full)
        assert engine.step() == []
    assert all(isinstance(request.error, RuntimeError) for request in requests)
    assert engine.step() == []
    after = Request([5] * 7, Sampler(Sampling(), 0), 9)
    engine.add(after)
    while not after.finished:
        engine.step()
    assert after.reply.tokens == alone(model, after)
