"""Drafted tokens change nothing but the number of passes: each path is compared with the plain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import phimlx
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.generation import batch, speculation
from phimlx.generation.engine import Engine
from phimlx.generation.prompt_cache import PromptCache
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.generation.speculation import MAX_MATCH, MIN_MATCH, PromptLookup
from phimlx.models.base import CausalLM

MODELS = Path(__file__).parents[1] / "goldens" / "models"
NAMES = ("mini-step-32", "mini-window", "phi-4")
STEP = 32  # of mini-step-32


def free(tokens: int) -> float:
    """The cost of a pass that makes every draft worth while."""
    return 1.0


@pytest.fixture(scope="module")
def models() -> dict[str, CausalLM]:
    return {name: load_model(Checkpoint(MODELS / name), mx.float32) for name in NAMES}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts wherever two tokens stood before, right or wrong."""
    monkeypatch.setattr(speculation, "SHARES", (0.9,) * len(speculation.SHARES))


class Foresight(PromptLookup):
    """Drafts what the reply is known to be, and after some right tokens a wrong one."""

    known: ClassVar[list[int]] = []

    def draft(self, limit: int = 31) -> list[int]:
        right = self.known[len(self) : len(self) + (len(self) * 5) % 7]
        return [*right, 3, 3][:limit] if len(self) % 9 else []


@pytest.fixture
def foresight(monkeypatch: pytest.MonkeyPatch) -> type[Foresight]:
    monkeypatch.setattr(batch, "PromptLookup", Foresight)
    return Foresight


def repeating(length: int, period: int = 5) -> list[int]:
    return [4 + (i % period) * 11 for i in range(length)]


def reply_of(
    model: CausalLM, prompt: list[int], count: int, prompt_lookup: bool, **given: Any
) -> tuple[Request, list[int]]:
    sampling, seed = given.pop("sampling", Sampling()), given.pop("seed", 0)
    request = Request(prompt, Sampler(sampling, seed, prompt), count, **given)
    request.prompt_lookup = prompt_lookup
    chunks = [chunk.token for chunk in Engine(model, free).run(request)]
    assert chunks == request.reply.tokens
    return request, request.reply.tokens


SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.3),
    Sampling(temperature=1.0, top_k=3),
    Sampling(temperature=0.7, top_p=0.8, min_p=0.05),
    Sampling(repetition_penalty=1.2),
    Sampling(temperature=0.5, presence_penalty=0.5, frequency_penalty=0.2),
    Sampling(logit_bias={11: 4, 26: -3}),
)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_reply_is_that_without_drafts(
    models: dict[str, CausalLM], foresight: type[Foresight], name: str, sampling: Sampling
) -> None:
    """Prompts on either side of the LongRoPE step, and replies across it."""
    for length in (1, 12, 28, 31, 32, 33, 60):
        prompt = repeating(length)
        plain, expected = reply_of(models[name], prompt, 24, False, sampling=sampling, seed=length)
        foresight.known = prompt + expected
        request, tokens = reply_of(models[name], prompt, 24, True, sampling=sampling, seed=length)
        assert tokens == expected
        assert request.reply.finish_reason == plain.reply.finish_reason
        stats = request.reply.stats
        assert 0 < stats.accepted_tokens < stats.drafted_tokens
        assert stats.forward_passes == plain.reply.stats.forward_passes - stats.accepted_tokens
        assert plain.reply.stats.drafted_tokens == 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 17])
def test_any_limit_ends_it_there(
    models: dict[str, CausalLM], foresight: type[Foresight], count: int
) -> None:
    for length in (25, 40):
        cache, plain_cache = (PromptCache(models["mini-step-32"]) for _ in range(2))
        prompt = repeating(length)
        _, expected = reply_of(models["mini-step-32"], prompt, count, False, cache=plain_cache)
        foresight.known = prompt + expected
        request, tokens = reply_of(models["mini-step-32"], prompt, count, True, cache=cache)
        assert tokens == expected
        assert request.reply.finish_reason == "length"
        assert cache.tokens == plain_cache.tokens
        assert request.computed == len(cache.tokens)


@pytest.mark.parametrize("place", range(12))
def test_a_stop_token_ends_it_wherever_it_comes(
    models: dict[str, CausalLM], foresight: type[Foresight], place: int
) -> None:
    model, prompt = models["phi-4"], repeating(30)
    _, whole = reply_of(model, prompt, 40, False)
    stop = frozenset(whole[place : place + 1])
    foresight.known = prompt + whole
    cache, plain_cache = PromptCache(model), PromptCache(model)
    _, expected = reply_of(model, prompt, 40, False, stop_tokens=stop, cache=plain_cache)
    request, tokens = reply_of(model, prompt, 40, True, stop_tokens=stop, cache=cache)
    assert tokens == expected
    assert request.reply.finish_reason == "stop"
    assert cache.tokens == plain_cache.tokens


@pytest.mark.parametrize("length", [20, 26, 40])
def test_the_next_turn_goes_on_from_the_same_cache(
    models: dict[str, CausalLM], foresight: type[Foresight], length: int
) -> None:
    model = models["mini-step-32"]
    caches = {False: PromptCache(model), True: PromptCache(model)}
    turns = {False: repeating(length), True: repeating(length)}
    for new in (3, 7, 2):
        for drafts, cache in caches.items():
            _, tokens = reply_of(model, turns[drafts], 6, drafts, cache=cache)
            foresight.known = turns[drafts] + tokens
            turns[drafts] = [*turns[drafts], *tokens, *repeating(new, 3)]
        assert turns[True] == turns[False]
        assert caches[True].tokens == caches[False].tokens
        stores = (caches[True].kv.store, caches[False].kv.store)
        for one, other in zip(*(store.arrays for store in stores), strict=True):
            end = caches[True].kv.length
            held, wanted = one[:, :, :end], other[:, :, :end]
            assert mx.abs(held - wanted).max() <= 1e-4 * mx.abs(wanted).max()


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 7, 11])
def test_what_a_reader_left_is_all_that_stays(
    models: dict[str, CausalLM], foresight: type[Foresight], taken: int
) -> None:
    model, prompt = models["phi-4"], repeating(30)
    foresight.known = prompt + reply_of(model, prompt, 40, False)[1]
    cache = PromptCache(model)
    request = Request(prompt, Sampler(Sampling(), 0), 40, cache=cache)
    chunks = Engine(model, free).run(request)
    said = [next(chunks).token for _ in range(taken)]
    chunks.close()
    assert request.reply.tokens == said
    assert cache.tokens == (prompt + said if taken else [])
    assert request.computed == len(cache.tokens)


QUESTION = "What is the capital of France?"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_words_stop_strings_and_quantized_weights(
    foresight: type[Foresight], bits: int, temperature: float
) -> None:
    phi = phimlx.load("nano", dtype="float32")
    if bits == 8:
        nn.quantize(phi.model, group_size=32, bits=bits)
    asked = {"temperature": temperature, "seed": 3, "max_tokens": 60}
    phi.eos = frozenset()  # so that it goes on
    plain = phi.generate(QUESTION, prompt_lookup=False, **asked)
    foresight.known = phi.encode(QUESTION) + plain.tokens
    drafted = phi.generate(QUESTION, **asked)
    assert (drafted.tokens, drafted.text) == (plain.tokens, plain.text)
    assert drafted.stats.accepted_tokens
    for place in range(1, len(plain.text) - 1, 11):
        stop = plain.text[place : place + 3]
        caches = phi.new_cache(), phi.new_cache()
        cut = phi.generate(QUESTION, stop=stop, prompt_lookup=False, cache=caches[0], **asked)
        again = phi.generate(QUESTION, stop=stop, cache=caches[1], **asked)
        assert (again.text, again.tokens) == (cut.text, cut.tokens)
        assert again.finish_reason == cut.finish_reason == "stop"
        assert caches[0].tokens == caches[1].tokens


def test_rows_of_a_batch_draft_when_one_is_left(
    models: dict[str, CausalLM], foresight: type[Foresight]
) -> None:
    model = models["mini-step-32"]
    prompts, counts = [repeating(20), repeating(27, 4), repeating(9, 3)], [4, 40, 9]
    expected = [
        reply_of(model, prompt, count, False)[1]
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    foresight.known = prompts[1] + expected[1]
    requests = [
        Request(prompt, Sampler(Sampling(), 0), count)
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    Engine(model, free).run_all(requests)
    assert [request.reply.tokens for request in requests] == expected
    assert requests[1].reply.stats.accepted_tokens > 0
    assert requests[0].reply.stats.drafted_tokens == 0


def longest_repeat(text: list[int]) -> tuple[int, list[int]]:
    """The length of the longest repeated ending, and the places behind where it stands before."""
    best = 0
    places: list[int] = []
    for end in range(len(text) - 1):
        length = 0
        while length <= end and length < MAX_MATCH and text[end - length] == text[-1 - length]:
            length += 1
        if length > best:
            best, places = length, []
        if length == best and best:
            places.append(end + 1)
    return best, places


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 31))
@settings(deadline=None)
def test_a_draft_follows_the_longest_repeated_ending(text: list[int], limit: int) -> None:
    draft = PromptLookup(text, free).draft(limit)
    best, places = longest_repeat(text)
    if best < MIN_MATCH or len(text) <= MIN_MATCH:
        assert draft == []
    else:
        assert draft == text[places[-1] : places[-1] + limit][: len(draft)]
        assert 1 <= len(draft) <= limit


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.lists(st.integers(0, 3)))
@settings(deadline=None)
def test_a_text_that_grows_is_searched_as_a_whole(text: list[int], more: list[int]) -> None:
    """Going on where a draft was right must find what a search from nothing finds, or better."""
    lookup = PromptLookup(text, free)
    lookup.extend(more)
    whole = [*text, *more]
    assert len(lookup) == len(whole)
    best, places = longest_repeat(whole)
    if best >= MIN_MATCH and len(whole) > MIN_MATCH:
        assert any(whole[place:][:1] == lookup.draft(1) for place in places)


def test_tokens_that_no_reply_holds_are_not_drafted() -> None:
    text = [1, 2, 3, 99, 4, 5, 1, 2]
    assert PromptLookup(text, free).draft(9) == [3, 99, 4, 5, 1, 2]
    assert PromptLookup(text, free, never=[99]).draft(9) == [3]
    assert PromptLookup(text, free, last=[99]).draft(9) == [3, 99]


def steep(tokens: int) -> float:
    return float(tokens)


def texts() -> Iterator[tuple[str, list[int]]]:
    yield "fresh", [(7919 * i * i + 104729 * i) % 50021 for i in range(400)]
    yield "repeated", [i % 50 for i in range(400)]


@pytest.mark.parametrize(("kind", "text"), list(texts()))
def test_drafts_grow_where_they_are_right_and_end_where_they_are_not(
    monkeypatch: pytest.MonkeyPatch, kind: str, text: list[int]
) -> None:
    monkeypatch.undo()
    lookup = PromptLookup(text[:100], lambda tokens: 1 + 0.1 * (tokens - 1))
    lookup.extend(text[100:])
    if kind == "fresh":
        assert lookup.draft() == []
    else:
        assert len(lookup.draft()) > 10
        wrong = [1000 + i for i in range(40)]
        lookup.extend([n for pair in zip(text, wrong, strict=False) for n in (*text[:3], *pair)])
        assert len(lookup.draft()) <= 3


def test_where_a_pass_costs_what_its_tokens_do_nothing_is_drafted() -> None:
    assert PromptLookup(repeating(100), steep).draft() == []
