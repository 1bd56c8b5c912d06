"""Both encoders as parts of functions that MLX differentiates and compiles.

Tracing fails where a function evaluates an array or makes it one of numpy's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.models.phi4mm.audio import audio_layouts
from tests.models.phi4mm import test_audio, test_vision


@dataclass(frozen=True)
class Traced:
    """An encoder, its arrays, and the function of both that gives features."""

    module: nn.Module
    arrays: mx.array
    features: Callable[[mx.array], mx.array]


def vision() -> Traced:
    """An image of four crops, of which some show odd numbers of patches."""
    module, batch = test_vision.embedding(), test_vision.inputs("corner")
    layouts = test_vision.layouts(batch)
    return Traced(module, batch["input_image_embeds"], lambda x: mx.concatenate(module(x, layouts)))


def audio() -> Traced:
    """A clip of two blocks, and one that is shorter, with what their projection makes of them."""
    module = test_audio.embedding()
    frames, sizes, mask = test_audio.clips([301, 150], masked=True)
    layouts = audio_layouts(frames.shape, np.array(sizes), np.array(mask))

    def features(x: mx.array) -> mx.array:
        return module.project(mx.concatenate(module.encode(x, layouts)), "speech")

    return Traced(module, frames, features)


ENCODERS = [vision, audio]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_are_the_slopes_of_the_features(encoder: Callable[[], Traced]) -> None:
    """Against the difference of two evaluations, beside the point."""
    made = encoder()
    mx.random.seed(5)
    cotangent = mx.random.normal(made.features(made.arrays).shape)

    def loss(parameters: dict[str, mx.array], x: mx.array) -> mx.array:
        made.module.update(parameters)
        return (made.features(x) * cotangent).sum()

    point = (made.module.trainable_parameters(), made.arrays)
    value, gradients = mx.value_and_grad(loss, argnums=(0, 1))(*point)
    made.module.update(point[0])
    assert np.allclose(value, loss(*point), rtol=1e-5)
    # Uphill, each array by a ten-thousandth of what its numbers are.
    step = tree_map(lambda x, slope: 1e-4 * mx.abs(x).mean() * mx.sign(slope), point, gradients)
    above, below = (loss(*tree_map(partial(_moved, sign), point, step)).item() for sign in (1, -1))
    made.module.update(point[0])
    slopes: dict[str, mx.array] = dict(
        tree_flatten(tree_map(lambda slope, change: (slope * change).sum(), gradients, step))
    )
    expected = sum(slope.item() for slope in slopes.values())
    assert (above - below) / 2 == pytest.approx(expected, rel=5e-3)


def _moved(sign: int, x: mx.array, change: mx.array) -> mx.array:
    return x + sign * change


@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling for the CPU takes a compiler")
@pytest.mark.parametrize("encoder", ENCODERS)
def test_compiled_encoders_give_the_same_features(encoder: Callable[[], Traced]) -> None:
    made = encoder()
    compiled = mx.compile(made.features)
    for arrays in (made.arrays, 0.5 * made.arrays):
        assert np.allclose(compiled(arrays), made.features(arrays), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["image", "audio"])
def test_media_of_a_whole_model_have_gradients(data: Path, case: str) -> None:
    """`encode_media` of traced pixels and frames, beside sizes and masks that are known."""
    folder = data / "tiny" / "tiny-phi4mm-remote"
    model = load_model(Checkpoint(folder), mx.float32)
    arrays = {
        name.partition(".")[2]: array
        for name, array in mx.load(str(folder / "oracle.safetensors")).items()
        if name.startswith(f"{case}.") and ("image" in name[6:] or "audio" in name[6:])
    }
    traced = f"input_{case}_embeds"
    known = {name: array for name, array in arrays.items() if name != traced}

    def features(x: mx.array) -> mx.array:
        made = model.encode_media(**{traced: x}, **known)
        return mx.concatenate([part for part in made.parts if part is not None])

    mx.random.seed(6)
    cotangent = mx.random.normal(features(arrays[traced]).shape)

    def total(x: mx.array) -> mx.array:
        return (features(x) * cotangent).sum()

    x = arrays[traced]
    value, gradient = mx.value_and_grad(total)(x)
    assert value.item() == pytest.approx(total(x).item(), rel=1e-6)
    step = 1e-3 * mx.abs(x).mean() * mx.sign(gradient)
    above, below = (np.array(features(x + sign * step), np.float64) for sign in (1, -1))
    difference = ((above - below) * np.array(cotangent)).sum() / 2
    assert difference == pytest.approx((gradient * step).sum().item(), rel=1e-2)
