"""Sampling against distributions written out by hand."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phimlx.errors import GenerationError
from phimlx.generation.sampler import BIAS, Sampler, Sampling, restrict

# Five tokens with probabilities 0.5, 0.25, 0.125, 0.1, 0.025.
PROBABILITIES = [0.1, 0.5, 0.025, 0.25, 0.125]
LOGITS = mx.log(mx.array([PROBABILITIES]))


def kept(**settings: float) -> list[int]:
    """Tokens that sampling may still choose."""
    logits = restrict(LOGITS, Sampling(**{"temperature": 1.0, **settings}))
    return [i for i, logit in enumerate(logits[0].tolist()) if logit > -math.inf]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.4}, [1]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.9}, [0, 1, 3, 4]),
        ({"top_p": 1e-9}, [1]),
        ({"min_p": 0.3}, [1, 3]),
        ({"min_p": 1.0}, [1]),
        # Top-k first: among three tokens 0.5 is 4/7 of what is left, so 0.6 needs two.
        ({"top_k": 3, "top_p": 0.6}, [1, 3]),
        ({"top_k": 3, "top_p": 0.57}, [1]),
        # The temperature comes first: at 2 the likeliest of all holds only a third.
        ({"temperature": 2.0, "top_p": 0.4}, [1, 3]),
    ],
)
def test_what_is_kept(settings: dict[str, float], expected: list[int]) -> None:
    assert kept(**settings) == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.1, 1, 2, 3])
def test_top_p_of_a_large_vocabulary_keeps_what_a_float64_sum_keeps(
    seed: int, spread: float
) -> None:
    values = np.random.default_rng(seed).standard_normal(200_064) * spread
    logits = mx.array(values.astype(np.float32))[None]
    wide = np.array(logits[0]).astype(np.float64)
    order = np.argsort(-wide, kind="stable")
    likelihoods = np.exp(wide[order] - wide.max())
    before = (np.cumsum(likelihoods) - likelihoods) / likelihoods.sum()
    for top_p in (0.3, 0.9, 0.99, 0.999):
        found = restrict(logits, Sampling(temperature=1.0, top_p=top_p))[0]
        expected = np.zeros(wide.size, bool)
        expected[order[before < top_p]] = True
        assert (np.isfinite(np.array(found)) == expected).all(), top_p


def test_frequencies_follow_the_distribution() -> None:
    sampler = Sampler(Sampling(temperature=1.0), seed=3)
    drawn = Counter(int(sampler(LOGITS).item()) for _ in range(4000))
    for token, probability in enumerate(PROBABILITIES):
        spread = math.sqrt(probability * (1 - probability) / 4000)
        assert abs(drawn[token] / 4000 - probability) < 4.5 * spread


def test_a_seed_fixes_the_tokens_and_leaves_the_process_stream_alone() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0), seed)
        return [int(sampler(LOGITS).item()) for _ in range(30)]

    mx.random.seed(1)
    first = draw(7)
    mx.random.seed(2)
    assert draw(7) == first
    assert draw(8) != first


def test_penalties() -> None:
    """Worked by hand: CTRL's division and multiplication, then the two subtractions."""
    logits = mx.array([[2.0, -2.0, 1.0, 0.0]])
    repetition = Sampler(Sampling(repetition_penalty=2.0), 0, prompt=[0, 1])
    assert repetition._penalize(logits).tolist() == [[1.0, -4.0, 1.0, 0.0]]
    counted = Sampler(Sampling(presence_penalty=0.5, frequency_penalty=0.25), 0, prompt=[0, 1])
    assert int(counted(logits).item()) == 0  # the prompt does not count here
    assert int(counted(logits).item()) == 0
    assert counted._penalize(logits).tolist() == [[1.0, -2.0, 1.0, 0.0]]


def test_greedy_with_repetition_penalty_moves_on() -> None:
    sampler = Sampler(Sampling(repetition_penalty=10.0), 0)
    logits = mx.array([[3.0, 2.0, 1.0]])
    assert [int(sampler(logits).item()) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature is -1; it must be 0 or more."),
        ({"temperature": math.nan}, "temperature is nan; it must be 0 or more."),
        ({"top_p": 0}, "top_p is 0; it must be above 0 and at most 1."),
        ({"top_p": 1.5}, "top_p is 1.5; it must be above 0 and at most 1."),
        ({"top_k": -1}, "top_k is -1; it must be a whole number, 0 for no limit."),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number, 0 for no limit."),
        ({"min_p": 2}, "min_p is 2; it must be from 0 to 1."),
        ({"min_p": "a"}, "min_p is 'a'; it must be from 0 to 1."),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be above 0."),
        ({"presence_penalty": 3}, "presence_penalty is 3; it must be from -2 to 2."),
        ({"frequency_penalty": -3}, "frequency_penalty is -3; it must be from -2 to 2."),
        ({"logit_bias": [3]}, f"logit_bias is [3]; it must be {BIAS}."),
        ({"logit_bias": {-1: 1}}, f"logit_bias has the key -1; it must be {BIAS}."),
        ({"logit_bias": {"a": 1}}, f"logit_bias has the key 'a'; it must be {BIAS}."),
        ({"logit_bias": {"²": 1}}, f"logit_bias has the key '²'; it must be {BIAS}."),
        ({"logit_bias": {True: 1}}, f"logit_bias has the key True; it must be {BIAS}."),
        ({"logit_bias": {2.0: 1}}, f"logit_bias has the key 2.0; it must be {BIAS}."),
        (
            {"logit_bias": {"3": 101}},
            "logit_bias of token '3' is 101; it must be from -100 to 100.",
        ),
        ({"logit_bias": {3: -101}}, "logit_bias of token 3 is -101; it must be from -100 to 100."),
        (
            {"logit_bias": {3: math.nan}},
            "logit_bias of token 3 is nan; it must be from -100 to 100.",
        ),
        ({"logit_bias": {3: "1"}}, "logit_bias of token 3 is '1'; it must be from -100 to 100."),
        ({"logit_bias": {3: True}}, "logit_bias of token 3 is True; it must be from -100 to 100."),
        ({"logit_bias": {3: 1, "3": 2}}, "logit_bias has token 3 twice."),
    ],
)
def test_values_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError) as error:
        Sampling(**settings)
    assert str(error.value) == message


NUMBERS = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty"),
)
ALLOWED = {
    "temperature": (0, 0.7, 2, 100),
    "top_k": (0, 1, 200_064),
    "top_p": (1e-9, 0.5, 1),
    "min_p": (0, 0.5, 1),
    "repetition_penalty": (1e-9, 1, 5),
    "presence_penalty": (-2, 0, 2),
    "frequency_penalty": (-2, 0, 2),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_bounds_are_allowed_and_what_is_no_number_is_not(name: str) -> None:
    for value in ALLOWED[name]:
        assert getattr(Sampling(**{name: value}), name) == value
    for bad in (None, True, "1", [1], math.nan, math.inf, -math.inf, -1e9):
        with pytest.raises(GenerationError, match=rf"^{name} is .*; it must be .*\.$"):
            Sampling(**{name: bad})


def test_a_bias_is_added_before_penalties_and_temperature() -> None:
    """As OpenAI has it: added to what the model gives, and all else works on the sum."""
    logits = mx.array([[2.0, -2.0, 1.0, 0.0]])
    given: Any = {"1": 6, 0: -3, 3: 0.5}
    settings = Sampling(repetition_penalty=2.0, logit_bias=given)
    assert settings.logit_bias == {1: 6.0, 0: -3.0, 3: 0.5}
    assert not settings.is_greedy
    # Biased: -1, 4, 1, 0.5. Tokens of the prompt, 1 and 2, are halved: -1, 2, 0.5, 0.5.
    sampler = Sampler(settings, 0, prompt=[1, 2])
    assert int(sampler(logits).item()) == 1
    # Token 1 has been said, which changes nothing more for it; without its bias it is the last.
    assert int(sampler(mx.array([[2.0, -8.0, 1.0, 0.0]])).item()) in (2, 3)
    assert int(Sampler(Sampling(logit_bias={0: -100}), 0)(logits).item()) == 2
    warm = Sampler(Sampling(temperature=5.0, logit_bias={3: 100}), 0)
    assert {int(warm(logits).item()) for _ in range(50)} == {3}
    assert hash(settings) == hash(Sampling(repetition_penalty=2.0))


@pytest.mark.parametrize(
    ("file", "usual", "expected"),
    [
        ({}, {}, Sampling()),
        ({}, {"temperature": 0.8, "top_p": 0.95}, Sampling(temperature=0.8, top_p=0.95)),
        (
            {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95},
            {},
            Sampling(temperature=0.8, top_k=50, top_p=0.95),
        ),
        ({"do_sample": True}, {}, Sampling(temperature=1.0)),
        ({"do_sample": False, "temperature": 0.8}, {"temperature": 0.8}, Sampling()),
        ({"temperature": 0.6}, {"temperature": 0.8, "top_p": 0.95}, Sampling(0.6, top_p=0.95)),
    ],
)
def test_defaults_of_a_model(
    file: dict[str, float], usual: dict[str, float], expected: Sampling
) -> None:
    assert Sampling.defaults(file, usual) == expected
