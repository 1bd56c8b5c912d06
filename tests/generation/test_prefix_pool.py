"""Prefixes reused in the continuous batch: less is computed, and every reply is what it was."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import pytest

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.generation import prefill, prefix_pool, prompts
from phimlx.generation.engine import Engine, Totals
from phimlx.generation.placed_media import Media
from phimlx.generation.prefix_file import Source
from phimlx.generation.prefix_store import BLOCK, PrefixStore, list_entries
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.machine.memory import cache_bytes_per_token
from phimlx.models.base import CausalLM
from phimlx.models.phi4mm.model import Phi4MMForCausalLM
from tests.everything import everything
from tests.generation.test_engine_media import folder, model, picture, plain, seen, sound

__all__ = ["folder", "model", "seen"]  # fixtures of the multimodal model

MODELS = Path(__file__).parents[1] / "goldens" / "models"
NAMES = ["mini-step-32", "mini-window", "phi-4", "llama-dynamic"]
GREEDY = Sampling()


@pytest.fixture(scope="module", params=NAMES)
def text_model(request: pytest.FixtureRequest) -> CausalLM:
    return load_model(Checkpoint(MODELS / request.param), mx.float32)


@pytest.fixture(scope="module")
def long_rope() -> CausalLM:
    """Its step is at 32 tokens."""
    return load_model(Checkpoint(MODELS / "mini-step-32"), mx.float32)


@pytest.fixture(scope="module")
def phi_4() -> CausalLM:
    return load_model(Checkpoint(MODELS / "phi-4"), mx.float32)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prefill, prompts):
        monkeypatch.setattr(module, "prefill_tokens", lambda: 16)
    monkeypatch.setattr(prefill, "SHARES", 1)
    monkeypatch.setattr(prefix_pool, "LEAST", 2)


def words(count: int, start: int = 3) -> list[int]:
    """Tokens without a pattern that a draft would find."""
    return [3 + (start * 31 + i * i * 7 + i) % 120 for i in range(count)]


def asked(
    prompt: list[int],
    count: int = 8,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    kv_bits: int | None = None,
    media: Media | None = None,
    lookup: bool = True,
) -> Request:
    sampler = Sampler(sampling, seed, prompt)
    return Request(prompt, sampler, count, kv_bits=kv_bits, media=media, prompt_lookup=lookup)


def alone(model: CausalLM, request: Request) -> list[int]:
    """What a request is answered without anything known of it."""
    sampler = request.sampler
    other = asked(
        request.prompt, request.max_tokens, sampler.sampling, sampler.seed, request.kv_bits,
        request.media, lookup=False,
    )  # fmt: skip
    list(Engine(model).run(other))
    return other.reply.tokens


def answer(engine: Engine, *requests: Request) -> list[list[int]]:
    engine.add(*requests)
    finish(engine)
    return [request.reply.tokens for request in requests]


def finish(engine: Engine, limit: int = 2000) -> None:
    for _ in range(limit):
        if not engine.busy:
            return
        engine.step()
    raise AssertionError("there is no end")


def cached(request: Request) -> int:
    return request.reply.stats.cached_tokens


class Conversation:
    """Turns after a system prompt, each of which begins with all before it."""

    def __init__(self, system: list[int], rng: random.Random, kv_bits: int | None = None) -> None:
        self.tokens, self._rng, self._kv_bits = list(system), rng, kv_bits
        self.request: Request | None = None
        self.reused = 0

    def ask(self) -> Request:
        rng = self._rng
        prompt = self.tokens + [rng.randrange(4, 120) for _ in range(rng.choice([1, 4, 9]))]
        sampling = rng.choice([GREEDY, Sampling(temperature=1.0, top_k=20)])
        self.request = asked(prompt, rng.choice([1, 3, 8]), sampling, 7, self._kv_bits)
        return self.request

    def end_turn(self) -> None:
        assert self.request is not None
        self.reused += cached(self.request)
        self.tokens = self.request.tokens
        self.request = None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_conversations_that_interleave(
    text_model: CausalLM, seed: int, kv_bits: int | None
) -> None:
    """In both regimes of LongRoPE and across its step, some turns cancelled, memory scarce."""
    if kv_bits and text_model.config.head_dim % 32:
        pytest.skip("heads that are not quantized")
    rng = random.Random(seed)
    per_token = cache_bytes_per_token(text_model.config, 4, kv_bits)
    engine = Engine(text_model, lambda tokens: 1.0, memory=300 * per_token)
    engine = engine if seed else Engine(text_model)
    system = [rng.randrange(4, 120) for _ in range(12)]
    talks = [Conversation(system, rng, kv_bits) for _ in range(4)]
    ended = said = 0
    for _ in range(400):
        for talk in talks:
            if talk.request is None and rng.random() < 0.3 and len(talk.tokens) < 70:
                engine.add(talk.ask())
        if rng.random() < 0.02 and (active := [t.request for t in talks if t.request]):
            engine.cancel(rng.choice(active))
        engine.step()
        for talk in talks:
            if talk.request is not None and talk.request.finished:
                expected = alone(text_model, talk.request)
                assert talk.request.reply.tokens == expected[: len(talk.request.reply.tokens)]
                whole = talk.request.reply.finish_reason == "length"
                assert not whole or talk.request.reply.tokens == expected
                assert talk.request.cache is None
                ended += 1
                said += len(expected) if whole else len(talk.request.reply.tokens)
                talk.end_turn()
        if all(len(talk.tokens) >= 70 and talk.request is None for talk in talks):
            break
    assert ended >= 16
    assert sum(talk.reused for talk in talks) > 200
    assert engine.totals.generated_tokens == said
    assert not engine.busy


@pytest.mark.parametrize("kv_bits", [None, 4])
def test_a_turn_computes_what_is_new_alone(phi_4: CausalLM, kv_bits: int | None) -> None:
    engine = Engine(phi_4)
    first = asked(words(30), 5, kv_bits=kv_bits)
    answer(engine, first)
    second = asked([*first.tokens, *words(4, 9)], 5, kv_bits=kv_bits)
    assert answer(engine, second) == [alone(phi_4, second)]
    assert cached(second) == 34  # the last token of a reply is not fed
    other = asked(second.prompt, 5, kv_bits=8 if kv_bits is None else None)
    assert answer(engine, other) == [alone(phi_4, other)]
    assert cached(other) == 0
    assert engine.totals == Totals(3, 30 + 39 + 39, 34, 1, 15)


def test_rows_that_are_being_computed_are_begun_from(phi_4: CausalLM) -> None:
    """A system prompt is read once, whether its first row decodes or is prefilled."""
    system = words(40)
    engine = Engine(phi_4)
    first, *others = (asked([*system, *words(5 + n, n)], 30) for n in range(4))
    engine.add(first)
    engine.step()
    engine.add(others[0])
    for _ in range(8):
        engine.step()
    engine.add(*others[1:])
    finish(engine)
    for request in (first, *others):
        assert request.reply.tokens == alone(phi_4, request)
    assert [cached(request) for request in (first, *others)] == [0, 40, 40, 40]


def test_short_questions_after_one_text_are_prefilled_together(
    phi_4: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = words(40)
    engine = Engine(phi_4)
    answer(engine, asked(system))
    shapes: list[tuple[int, ...]] = []
    hidden_states = CausalLM.hidden_states

    def spy(self: CausalLM, input_ids: mx.array, *rest: object, **options: object) -> mx.array:
        shapes.append(tuple(input_ids.shape))
        return hidden_states(self, input_ids, *rest, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(CausalLM, "hidden_states", spy)
        several = [asked([*system, *words(n, n)], 3 + 2 * n) for n in (2, 5, 4)]
        fresh = asked(words(5, 77))
        answer(engine, *several, fresh)
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 5), (3, 5)]
    assert [cached(request) for request in (*several, fresh)] == [40, 40, 40, 0]
    for request in (*several, fresh):
        assert request.reply.tokens == alone(phi_4, request)
    again = asked([*several[1].tokens, 9])  # from a row with padding in its middle
    assert answer(engine, again) == [alone(phi_4, again)]
    assert cached(again) == len(several[1].tokens) - 1


def test_other_rope_factors_are_never_taken(long_rope: CausalLM) -> None:
    engine = Engine(long_rope)
    short = asked(words(20), 4)
    answer(engine, short)
    over = asked([*short.tokens, *words(20, 5)], 4)
    assert answer(engine, over) == [alone(long_rope, over)]
    assert cached(over) == 0
    further = asked([*over.tokens, 5], 4)
    assert answer(engine, further) == [alone(long_rope, further)]
    assert cached(further) == len(over.tokens) - 1
    back = asked([*short.prompt, 8, 9], 4)
    assert answer(engine, back) == [alone(long_rope, back)]
    assert cached(back) == 20  # the short row is there still


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_what_a_cancelled_request_computed_is_reused(phi_4: CausalLM, steps: int) -> None:
    engine = Engine(phi_4)
    first = asked(words(40), 20)
    engine.add(first)
    for _ in range(steps):
        engine.step()
    engine.cancel(first)
    assert not engine.busy
    again = asked(words(40), 20)
    assert answer(engine, again) == [alone(phi_4, again)]
    assert cached(again) == min(16 * steps, 39)


def test_what_is_kept_gives_way_before_a_request_waits(phi_4: CausalLM) -> None:
    per_token = cache_bytes_per_token(phi_4.config, 4)
    engine = Engine(phi_4, memory=200 * per_token, prefix_memory=120 * per_token)
    texts = [words(40, seed) for seed in range(5)]
    for text in texts:
        answer(engine, asked(text, 5))
        assert engine.prefix_bytes <= 120 * per_token
    assert engine.prefix_bytes == 2 * 44 * per_token
    wide = asked(words(150, 9), 5)
    engine.add(wide)
    engine.step()
    assert engine.running == 1
    assert engine.prefix_bytes <= 45 * per_token
    finish(engine)
    last = asked([*texts[4], 5], 5)
    assert answer(engine, last) == [alone(phi_4, last)]


def test_the_last_row_is_kept_though_it_alone_is_over_the_limit(phi_4: CausalLM) -> None:
    per_token = cache_bytes_per_token(phi_4.config, 4)
    engine = Engine(phi_4, prefix_memory=60 * per_token)
    for text in (words(20), words(100, 7)):
        answer(engine, asked(text, 5))
    assert engine.prefix_bytes == 104 * per_token
    further = asked([*words(100, 7), 5], 5)
    assert answer(engine, further) == [alone(phi_4, further)]
    assert cached(further) == 100
    answer(engine, asked(words(20, 3), 5))
    assert engine.prefix_bytes == 24 * per_token


def test_nothing_is_kept_where_no_memory_is_given(phi_4: CausalLM) -> None:
    engine = Engine(phi_4, prefix_memory=0)
    answer(engine, asked(words(40)))
    again = asked(words(40))
    assert answer(engine, again) == [alone(phi_4, again)]
    assert (cached(again), engine.prefix_bytes) == (0, 0)


def test_run_each_reuses_within_its_requests(phi_4: CausalLM) -> None:
    system = words(60)
    requests = [asked([*system, *words(3, n)], 4) for n in range(6)]
    Engine(phi_4).run_all(requests, batch_size=2)
    assert [r.reply.tokens for r in requests] == [alone(phi_4, r) for r in requests]
    assert [cached(request) for request in requests[2:]] == [60] * 4


def test_media_are_told_by_what_they_are(
    model: Phi4MMForCausalLM, seen: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (pixels, first), (_, other), (samples, heard) = picture("a"), picture("b"), sound("b")
    for module in (prefill, prompts):
        monkeypatch.setattr(module, "prefill_tokens", lambda: 512)
    engine = Engine(model)
    head = [*words(3), *pixels]
    cases = [
        asked([*head, *words(2)], 4, media=first),
        asked([*head, *words(3, 9)], 4, media=first),
        asked([*head, *words(2)], 4, media=other),
        asked([*words(3), *samples, *words(2)], 4, media=heard),
        asked(words(4), 4),
    ]
    expected = [plain(model, request.prompt, request.media, 4) for request in cases]
    seen.clear()
    for request, tokens in zip(cases, expected, strict=True):
        assert answer(engine, request) == [tokens]
    assert [cached(request) for request in cases] == [0, len(head), 3, 0, 0]
    assert seen == [(1, 0), (1, 0), (0, 1)]  # the second question's picture is not seen again


@everything
@pytest.mark.slow
def test_features_are_kept_where_keys_and_values_are_not(
    model: Phi4MMForCausalLM, seen: list[tuple[int, int]]
) -> None:
    """The row whose step is crossed, and a prompt that needs what the other table gives."""
    (samples, heard) = sound("b")
    step = model.config.rope.original_max_position_embeddings
    engine = Engine(model)
    prompt = [*samples, *words(step - 14)]
    request = asked(prompt, 12, media=heard)  # ten sounds: it crosses within its reply
    expected = plain(model, prompt, heard, 12)
    seen.clear()
    assert answer(engine, request) == [expected]
    again = asked([*prompt[:-5], 7], 3, media=heard)
    assert answer(engine, again) == [plain(model, again.prompt, heard, 3)]
    assert cached(again) == 0


@pytest.fixture
def store(phi_4: CausalLM, tmp_path: Path) -> PrefixStore:
    def identify(loaded: str | None) -> Source:
        return Source("0" * 64, None, "tiny", "tiny")

    return PrefixStore(phi_4, identify, folder=tmp_path, min_tokens=1)


def test_prefixes_on_disk(phi_4: CausalLM, store: PrefixStore, tmp_path: Path) -> None:
    text = words(BLOCK + 60)
    engine = Engine(phi_4, prefixes=store)
    answer(engine, asked(text, 4))
    assert list_entries(tmp_path) == []
    engine.save_prefixes()
    assert len(list_entries(tmp_path)) == 1
    for question in ([5, 6], [7]):
        anew = Engine(phi_4, prefixes=store)
        request = asked([*text, *question], 4)
        assert answer(anew, request) == [alone(phi_4, request)]
        assert cached(request) == len(text)


def test_what_is_kept_takes_no_more_than_it_says(long_rope: CausalLM) -> None:
    """A row that was one of several holds nothing of the others."""
    engine = Engine(long_rope)
    before = mx.get_active_memory()
    for batch in range(4):
        requests = [
            Request(words(24, 50 * batch + n), Sampler(GREEDY, 0), 2, prompt_lookup=False)
            for n in range(8)
        ]
        engine.add(*requests)
        while engine.busy:
            engine.step()
    del requests
    held = engine.prefix_bytes
    assert held > 0
    assert mx.get_active_memory() - before < 1.5 * held
