"""A decoder layer is built of at most as many primitives as mlx-lm's."""

from __future__ import annotations

import mlx.core as mx
import pytest

from scripts.bench.operations import SHAPES, fast_as_one, kernels, per_layer, primitives


@pytest.mark.parametrize("tokens", [1, 64], ids=["decode", "prefill"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_is_at_most_mlx_lms(shape: str, tokens: int) -> None:
    whole = per_layer(SHAPES[shape], tokens)
    assert whole["phimlx"].total() <= whole["mlx-lm"].total()
    with fast_as_one():
        as_on_a_gpu = per_layer(SHAPES[shape], tokens)
    assert as_on_a_gpu["phimlx"].total() <= as_on_a_gpu["mlx-lm"].total()
    assert kernels(as_on_a_gpu["phimlx"]) <= kernels(as_on_a_gpu["mlx-lm"])


def test_primitives_are_counted() -> None:
    x = mx.array([1.0, 2.0])
    mx.eval(x)
    assert primitives(x) == {}
    assert primitives(mx.sin(x)) == {"Sin": 1}
    pieces = [mx.sin(x), mx.cos(x), mx.exp(x)]
    assert primitives(mx.concatenate(pieces)) == {"Sin": 1, "Cos": 1, "Exp": 1, "Concatenate": 3}
    fused = mx.compile(lambda a: mx.sin(a) * a, shapeless=True)
    (name,) = primitives(fused(x))
    assert name.startswith("Compiled")
