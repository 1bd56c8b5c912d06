"""Why a model computes no numbers: told once, after the fact, by a second pass."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx.utils import tree_flatten

from phimlx.errors import GenerationError
from phimlx.models.base import CausalLM


def nonfinite_error(model: CausalLM, tokens: Sequence[int]) -> GenerationError:
    """The error for logits that are not finite, naming where they cease to be.

    Args:
        tokens: prompt and reply up to these logits.
    """
    arrays: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    damaged = next((name for name, array in arrays if not _is_finite(array)), None)
    dtype = str(model.embed(mx.array([tokens[:1]])).dtype).removeprefix("mlx.core.")
    if damaged is not None:
        return GenerationError(
            f"The model computes no numbers in {dtype}: its weights hold some that are not finite, "
            f"the first in {damaged}.",
            hint="Convert it again from its source, or download it again.",
        )
    # Where machines share the model, one alone cannot walk its layers.
    layer = _first_layer(model, tokens) if model.leader is None else None
    place = "" if layer is None else f": what model.layers.{layer} puts out is not finite"
    return GenerationError(
        f"The model computes no numbers in {dtype}{place}.",
        hint="Compute in float32: --dtype float32.",
    )


def _first_layer(model: CausalLM, tokens: Sequence[int]) -> int | None:
    """The first decoder layer whose output is not finite, given these tokens as text."""
    input_ids = mx.array([list(tokens)])
    x, forward = model.embed(input_ids), model.forward_pass(input_ids)
    for index, layer in enumerate(model.layers):
        x = layer(x, forward)
        if not _is_finite(x):
            return index
    return None


def _is_finite(array: mx.array) -> bool:
    return bool(mx.isfinite(array).all())
