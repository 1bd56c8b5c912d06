"""Several replies to one prompt: each is that of its seed alone."""

from __future__ import annotations

from typing import Any

import pytest

import phimlx
from phimlx.errors import GenerationError
from phimlx.generation.options import GenerationOptions

PROMPT = "Spell cat backwards."


@pytest.fixture(scope="module")
def phi() -> phimlx.Phi:
    return phimlx.load("nano", dtype="float32")


@pytest.mark.parametrize("seed", [5, 2**64 - 2])
def test_each_choice_is_that_of_its_seed_alone(phi: phimlx.Phi, seed: int) -> None:
    options: dict[str, Any] = {"temperature": 3.0, "max_tokens": 12, "logprobs": True}
    requests = phi.requests(PROMPT, GenerationOptions(seed=seed, **options), 4)
    assert [request.sampler.seed for request in requests] == [(seed + i) % 2**64 for i in range(4)]
    phi.engine.run_all(requests)
    for request in requests:
        alone = phi.generate(PROMPT, seed=request.sampler.seed, **options)
        assert request.reply.tokens == alone.tokens
        assert request.reply.text == alone.text
        told = [found.logprob for found in request.reply.logprobs]
        assert told == pytest.approx([found.logprob for found in alone.logprobs], abs=1e-4)
    assert len({tuple(request.reply.tokens) for request in requests}) > 1


def test_without_a_seed_one_is_drawn_for_all(phi: phimlx.Phi) -> None:
    first, second = phi.requests(PROMPT, GenerationOptions(), 2)
    assert second.sampler.seed == first.sampler.seed + 1


@pytest.mark.parametrize("n", [0, -1, True, 1.5, "2", None])
def test_what_is_no_count(phi: phimlx.Phi, n: int) -> None:
    with pytest.raises(GenerationError) as error:
        phi.requests(PROMPT, GenerationOptions(), n)
    assert str(error.value) == f"n is {n!r}; it must be 1 or more."


def test_a_cache_serves_one(phi: phimlx.Phi) -> None:
    options = GenerationOptions(cache=phi.new_cache())
    assert len(phi.requests(PROMPT, options, 1)) == 1
    with pytest.raises(GenerationError, match=r"^A cache serves one reply at a time"):
        phi.requests(PROMPT, options, 2)
