"""Sounds kept between turns: reused or heard anew, the logits are those of a fresh cache.

A sound's last token hears what stands behind it in the array, and that depends on how long the
other sounds of the prompt are. The original's processor pads several sounds to the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.generation.engine import Engine
from phimlx.generation.placed_media import Media
from phimlx.generation.prompt_cache import PromptCache
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.models.base import CausalLM

NATIVE = Path(__file__).parents[1] / "goldens" / "mm-native"
FRAMES = {"A": 41, "B": 100, "C": 46, "D": 96}  # only D fills its last token
TURNS = ["A", "AB", "BA", "B", "ACB", "D", "AD", "AC"]


@pytest.fixture(scope="module", params=["mm-native", "tiny-phi4mm-remote"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    if request.param == "mm-native":
        return load_model(Checkpoint(NATIVE), mx.float32)
    data = request.getfixturevalue("data")
    return load_model(Checkpoint(data / "tiny" / request.param), mx.float32)


def prepared(names: str) -> Media:
    """Sounds as `prepare_audio` makes them: padded to the longest, with a mask if several."""
    lengths = [FRAMES[name] for name in names]
    embeds = np.zeros((len(names), max(lengths), 80), np.float32)
    for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
        embeds[row, :length] = np.random.default_rng(ord(name)).normal(3, 2, (length, 80))
    tokens = [-(-length // 8) for length in lengths]
    arrays = {"input_audio_embeds": mx.array(embeds), "audio_embed_sizes": mx.array(tokens)}
    if len(names) > 1:
        mask = np.arange(max(lengths))[None] < np.array(lengths)[:, None]
        arrays["audio_attention_mask"] = mx.array(mask)
    return Media(arrays, tuple(zip([name.encode() for name in names], tokens, strict=True)))


class Watching(Sampler):
    """Remembers the logits that it chose from."""

    def __call__(self, logits: mx.array) -> mx.array:
        self.logits = np.array(logits[0])
        return super().__call__(logits)


def ask(model: CausalLM, names: str, cache: PromptCache) -> tuple[np.ndarray, int]:
    """The first logits of a reply, and how many tokens had to be computed."""
    assert model.placeholders is not None
    media, prompt = prepared(names), [3, 10]
    for name, (_, count) in zip(names, media.digests, strict=True):
        prompt += [model.placeholders.audio] * count + [20 + ord(name) % 7]
    sampler = Watching(Sampling(), 0)
    request = Request([*prompt, 30, 31], sampler, 1, media=media, cache=cache)
    Engine(model).run_all([request])
    logits = sampler.logits
    return logits[np.isfinite(logits)], len(request.prompt) - request.reply.stats.cached_tokens


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def run(model: CausalLM, turns: Sequence[str]) -> None:
    cache = PromptCache(model)
    for names in turns:
        fresh = PromptCache(model)
        expected, found = ask(model, names, fresh)[0], ask(model, names, cache)[0]
        features = [np.array(one.kv.features[0].audio) for one in (cache, fresh)]
        assert difference(features[0], features[1]) <= 1e-6, (turns, names)
        # Products of other shapes round otherwise, with text alone too.
        assert difference(found, expected) <= 3e-6, (turns, names)


@pytest.mark.parametrize("first", TURNS)
def test_any_turn_may_follow_any_other(model: CausalLM, first: str) -> None:
    for second in TURNS:
        run(model, [first, second, first])


@pytest.mark.parametrize("order", list(permutations(["A", "AB", "ABC"])), ids="-".join)
def test_every_order_of_turns_and_undo(model: CausalLM, order: tuple[str, ...]) -> None:
    run(model, [*order, *reversed(order)])


def test_a_sound_that_hears_the_same_is_reused(model: CausalLM) -> None:
    cache = PromptCache(model)
    whole = ask(model, "DB", cache)[1]
    assert ask(model, "DB", cache)[1] == 1
    assert ask(model, "DA", cache)[1] < whole - 13  # D fills its tokens: it hears no neighbour
    ask(model, "AB", cache)
    assert ask(model, "AC", cache)[1] > 8  # A heard seven frames beside B, and five beside C
    assert ask(model, "ACB", cache)[1] > 8


def test_the_difference_is_real(model: CausalLM) -> None:
    """What a sound hears beside a longer one is no rounding error."""
    alone = model.encode_media(**prepared("A").arrays).audio
    beside = model.encode_media(**prepared("AB").arrays).audio
    assert alone is not None
    assert beside is not None
    here = np.array(alone), np.array(beside[: len(alone)])
    assert difference(here[0], here[1]) > 1e-5
