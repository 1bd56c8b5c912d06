"""One cache, used by request after request, whatever becomes of who reads their replies."""

from __future__ import annotations

import gc

import pytest

import phimlx
from phimlx.errors import GenerationError
from phimlx.generation.stream import Stream

SUM, FRANCE = "What is 3 + 4?", "What is the capital of France?"


@pytest.fixture(scope="module")
def phi() -> phimlx.Phi:
    return phimlx.load("nano", dtype="float32")


def begun(phi: phimlx.Phi, cache: object, prompt: str = SUM) -> Stream:
    stream = phi.stream(prompt, cache=cache, temperature=0)
    next(stream)
    return stream


@pytest.mark.parametrize("end", ["collected", "closed", "kept"])
def test_an_abandoned_stream_claims_nothing(phi: phimlx.Phi, end: str) -> None:
    cache = phi.new_cache()
    abandoned = begun(phi, cache)
    assert phi.generate(FRANCE, cache=cache).text == "Paris"
    if end == "collected":
        del abandoned
        gc.collect()
    elif end == "closed":
        abandoned.close()
    for _ in range(2):
        assert phi.generate(SUM, cache=cache).text == "7"
        assert phi.generate(FRANCE, cache=cache).text == "Paris"


def test_a_cache_serves_one_reply_at_a_time(phi: phimlx.Phi) -> None:
    cache = phi.new_cache()
    first = begun(phi, cache, FRANCE)
    second = begun(phi, cache)
    with pytest.raises(GenerationError) as caught:
        next(first)
    assert str(caught.value) == ("This reply was ended: another one was begun with the same cache.")
    assert caught.value.hint == "Give replies that are read at the same time a cache each."
    assert first.reply.finish_reason == "cancelled"
    assert second.result().text == "7"
    assert list(first) == []


def test_a_stream_that_is_not_read_takes_no_cache(phi: phimlx.Phi) -> None:
    cache = phi.new_cache()
    first = begun(phi, cache, FRANCE)
    unread = phi.stream(SUM, cache=cache)
    assert first.result().text == "Paris"
    assert unread.result().text == "7"


def test_what_an_abandoned_reply_computed_is_reused(phi: phimlx.Phi) -> None:
    cache = phi.new_cache()
    begun(phi, cache, FRANCE)
    again = phi.generate(FRANCE, cache=cache, temperature=0)
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1
    assert again.text == "Paris"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_is_refused_by_any_other_model(phi: phimlx.Phi, dtype: str) -> None:
    other = phimlx.load("nano", dtype=dtype)
    for ask in (other.stream, other.generate):
        with pytest.raises(GenerationError) as caught:
            ask(SUM, cache=phi.new_cache())
        assert str(caught.value) == (
            "The cache belongs to another model, or to the same one loaded another time."
        )
        assert caught.value.hint == "Give each model a cache of its own: phi.new_cache()."
    assert other.generate(SUM, cache=other.new_cache()).text == "7"


def test_bytes_are_those_of_keys_and_values(phi: phimlx.Phi) -> None:
    cache = phi.new_cache()
    assert (cache.nbytes, cache.tokens) == (0, [])
    reply = phi.generate(SUM, cache=cache)
    config = phi.model.config
    numbers = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    assert cache.nbytes == 256 * numbers * 4  # the buffers grow by 256 tokens
    assert cache.tokens == phi.encode(SUM) + reply.tokens
