"""Replies of a model with states: cut, gone on with, drafted, in batches, from files — the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import phimlx
from phimlx.api import Phi
from phimlx.errors import CacheError, GenerationError
from phimlx.generation.engine import Engine
from phimlx.generation.prefill import prefill
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.generation.speculation import MAX_DRAFT, PromptLookup
from phimlx.models.base import CausalLM
from phimlx.models.phi4flash.cache import KEPT, MARKS, PLACES
from tests.generation.small import make_model, words

CONFIG: dict[str, Any] = {
    "model_type": "phi4flash", "hidden_size": 128, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 500,
    "sliding_window": 24, "layer_norm_eps": 1e-5, "rope_scaling": None,
    "original_max_position_embeddings": None,
}  # fmt: skip
OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
EXACT = 5e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("flash") / "model", **CONFIG)


@pytest.fixture(scope="module")
def phi(folder: Path) -> Phi:
    return phimlx.load(folder, dtype="float32")


def greedy(model: CausalLM, prompt: list[int], count: int) -> list[int]:
    """One token after the other, behind a prompt in one pass."""
    cache, tokens = model.make_cache(), list[int]()
    ids = mx.array([prompt])
    while len(tokens) < count:
        ids = mx.argmax(model.head(model.hidden_states(ids, cache, outputs=1)), axis=-1)
        tokens.append(ids.item())  # type: ignore[arg-type]
    return tokens


def difference(found: mx.array, expected: mx.array) -> float:
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


def test_a_draft_can_be_taken_back() -> None:
    assert KEPT >= MAX_DRAFT + 1


@pytest.mark.parametrize("fed", [1, 40])
@pytest.mark.parametrize("cut", [1, 7, KEPT, KEPT + 1, 60])
def test_what_is_cut_is_as_if_it_had_never_been(phi: Phi, fed: int, cut: int) -> None:
    """Whether states can go back so far or not, and once more after that."""
    model, ids, more = phi.model, mx.array([words(90 + fed)]), mx.array([words(9, start=5)])
    cache = model.make_cache()
    model(ids[:, :90], cache)
    model(ids[:, 90:], cache)
    left = 90 + fed - cut
    for _ in range(2):
        cache.trim(left)
        assert cache.length == left
        found = model(more, cache)
        expected = model(mx.concatenate([ids[:, :left], more], axis=1))[:, -9:]
        assert found.shape == expected.shape
        assert difference(found, expected) <= EXACT
        assert cache.length == cache.held == left + 9
        left -= 3


def test_only_what_a_state_cannot_go_back_over_is_computed_again(phi: Phi) -> None:
    model, ids = phi.model, words(200)
    cache = model.make_cache()
    for _ in prefill(model, mx.array([ids]), cache, size=50):  # type: ignore[arg-type]
        pass
    for length, held in ((199, 199), (170, 170), (168, 168), (150, 118), (117, 68), (60, 0)):
        cache.trim(length)
        assert (cache.length, cache.held) == (length, held)
    assert MARKS == 3


def test_turns_share_what_they_can(phi: Phi) -> None:
    cache, conversation = phi.new_cache(), words(70)
    told = phi.generate(conversation, cache=cache, **OPTIONS)
    assert told.tokens == greedy(phi.model, conversation, 12)
    for turn in range(3):  # what was said stays
        conversation = conversation + told.tokens + words(15, start=turn)
        told = phi.generate(conversation, cache=cache, **OPTIONS)
        assert told.tokens == greedy(phi.model, conversation, 12)
        assert told.stats.cached_tokens >= len(conversation) - 15 - 1
    again = phi.generate(conversation, cache=cache, **OPTIONS)  # the same once more
    assert again.tokens == told.tokens
    assert again.stats.cached_tokens == len(conversation) - 16
    other = conversation + words(5, start=9)  # as where reasoning is left out
    told = phi.generate(other, cache=cache, **OPTIONS)
    assert told.tokens == greedy(phi.model, other, 12)
    assert told.stats.cached_tokens >= len(conversation) - KEPT
    elsewhere = words(40) + words(30, start=8)
    assert phi.generate(elsewhere, cache=cache, **OPTIONS).tokens == greedy(
        phi.model, elsewhere, 12
    )


def test_an_abandoned_reply_leaves_what_was_read(phi: Phi) -> None:
    cache, prompt = phi.new_cache(), words(60)
    stream = phi.stream(prompt, cache=cache, temperature=0, max_tokens=30)
    read = [next(stream).token for _ in range(7)]
    stream.close()
    assert cache.kv.held == cache.kv.length
    longer = prompt + [token for token in read if token is not None] + words(4, start=2)
    told = phi.generate(longer, cache=cache, **OPTIONS)
    assert told.tokens == greedy(phi.model, longer, 12)


@pytest.mark.parametrize("length", [1, 40])
def test_drafts_change_nothing(phi: Phi, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of which any number of tokens is right: as many are kept, and the state goes back."""
    prompt = words(length)
    expected = greedy(phi.model, prompt, 40)

    def draft(self: PromptLookup, limit: int = MAX_DRAFT) -> list[int]:
        done = len(self) - length
        right = expected[done : done + done % 7]
        return [*right, *[1] * (done % 3)][:limit]

    monkeypatch.setattr(PromptLookup, "draft", draft)
    request = Request(prompt, Sampler(Sampling(), 0), 40)
    Engine(phi.model).run_all([request])
    assert request.reply.tokens == expected
    stats = request.reply.stats
    assert stats.drafted_tokens > stats.accepted_tokens > 0
    assert stats.forward_passes < 40


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_rows_join_and_leave_a_batch(phi: Phi, kv_bits: int | None) -> None:
    prompts = [words(length, start=length) for length in (3, 41, 24, 90, 1)]
    counts = (9, 3, 12, 5, 14)

    def request(prompt: list[int], count: int) -> Request:
        return Request(prompt, Sampler(Sampling(), 0), count, kv_bits=kv_bits)

    alone = []
    for prompt, count in zip(prompts, counts, strict=True):
        one = request(prompt, count)
        Engine(phi.model).run_all([one])
        alone.append(one.reply.tokens)
    if kv_bits is None:
        assert alone[1] == greedy(phi.model, prompts[1], 3)
    engine = Engine(phi.model)
    together = [request(*pair) for pair in zip(prompts, counts, strict=True)]
    waiting = list(together)
    while not all(each.finished for each in together):
        if waiting:
            engine.add(waiting.pop(0))
        for _ in range(2):
            engine.step()
    assert [each.reply.tokens for each in together] == alone


@pytest.mark.parametrize("length", [70, 66, 40, 5])
def test_a_row_of_a_batch_is_a_cache_of_its_own(phi: Phi, length: int) -> None:
    """Whole or cut, and what it and the batch are fed does not reach the other."""
    model, more = phi.model, mx.array([words(6, start=4)])
    ids = mx.array([words(70), words(70, start=8)])
    mask = mx.array([[1] * 70, [0] * 30 + [1] * 40])
    for row, own in ((0, ids[:1]), (1, ids[1:, 30:])):
        cache = model.make_cache()
        model(ids, cache, attention_mask=mask)
        taken = cache.row(row, length)
        taken.part()
        found = model(more, taken)
        expected = model(mx.concatenate([own[:, :length], more], axis=1))[:, -6:]
        assert difference(found, expected) <= EXACT
        both = mx.concatenate([more, more])
        rest = model(both, cache)[row : row + 1]
        assert difference(rest, model(mx.concatenate([own, more], axis=1))[:, -6:]) <= EXACT


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_quantized_keys_and_values_are_near(phi: Phi, kv_bits: int) -> None:
    ids = mx.array([words(100)])
    whole, pieces, plain = (phi.model.make_cache(kv_bits=bits) for bits in (kv_bits, kv_bits, None))
    exact, found = phi.model(ids, plain), phi.model(ids, whole)
    again = [phi.model(ids[:, begin : begin + 7], pieces) for begin in range(0, 100, 7)]
    assert difference(mx.concatenate(again, axis=1), found) <= EXACT
    assert 1e-5 < difference(found, exact) <= (0.02 if kv_bits == 8 else 0.2)
    assert whole.nbytes < plain.nbytes


def test_heads_that_groups_do_not_divide_are_refused(data: Path) -> None:
    phi = phimlx.load(data / "tiny" / "tiny-phi4flash")
    with pytest.raises(GenerationError, match="heads have 8 channels"):
        phi.new_cache(kv_bits=8)


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_cache_in_a_file_goes_on_where_it_was(
    phi: Phi, folder: Path, tmp_path: Path, kv_bits: int | None
) -> None:
    """At its end, at a turn before, and elsewhere; in another process's model too."""
    prompt = words(150)
    cache = phi.new_cache(kv_bits=kv_bits)
    told = phi.generate(prompt, cache=cache, **OPTIONS)
    phi.save_cache(cache, tmp_path / "cache.safetensors")
    other = phimlx.load(folder, dtype="float32")
    for asked, cached in (
        (prompt + told.tokens + words(3), 161),
        (prompt, 118),
        (words(60) + words(20, start=9), 0),
    ):
        restored = other.load_cache(tmp_path / "cache.safetensors")
        found = other.generate(asked, cache=restored, **OPTIONS)
        assert found.tokens == phi.generate(asked, cache=phi.new_cache(kv_bits=kv_bits),
                                            **OPTIONS).tokens  # fmt: skip
        assert found.stats.cached_tokens == cached


@pytest.mark.parametrize("places", [[162, 0, 0, 0], [161, 162, 0, 0], [161, 118, 0, -1]])
def test_places_that_are_no_sense_are_refused(
    phi: Phi, tmp_path: Path, places: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = phi.new_cache()
    phi.generate(words(150), cache=cache, **OPTIONS)
    assert cache.kv.length == 161
    parts = cache.kv.store.parts

    def damaged(columns: int) -> Iterator[tuple[str, mx.array]]:
        for name, array in parts(columns):
            yield name, mx.array(places, mx.int32) if name == PLACES else array

    monkeypatch.setattr(cache.kv.store, "parts", damaged)
    phi.save_cache(cache, tmp_path / "cache.safetensors")
    with pytest.raises(CacheError) as caught:
        phi.load_cache(tmp_path / "cache.safetensors")
    assert str(caught.value) == "The file of a prompt cache is damaged: its places are no sense."


def test_long_prompts_are_kept_and_found(phi: Phi, tmp_path: Path) -> None:
    def store() -> Any:
        return phi.prefix_store(folder=tmp_path, min_tokens=1)

    document = words(600)
    kept = store()
    cache = phi.new_cache(prefixes=kept)
    phi.generate(document, cache=cache, **OPTIONS)
    kept.save(cache)
    asked = document + words(8, start=6)
    found = phi.generate(asked, cache=phi.new_cache(prefixes=store()), **OPTIONS)
    assert found.tokens == greedy(phi.model, asked, 12)
    assert found.stats.cached_tokens == 600 - KEPT
