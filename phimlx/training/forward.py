"""A batch of examples -> the model's hidden states where something is to be learned.

Knows padding, packing, LongRoPE's regimes and gradient checkpointing; knows nothing of losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from phimlx.models.phi3 import DecoderLayer, Phi3ForCausalLM
from phimlx.models.rope import Rope
from phimlx.training.data.batches import Batch


def inputs_of(batch: Batch, rope: Rope) -> dict[str, mx.array]:
    """A batch as the device takes it.

    Returns:
        tokens, picked, targets, weights and, of packed rows, segments as in `Batch`; cos and sin,
        float32 `[rows, 1, length, dims / 2]`, from the table that each example's own length calls
        for.
    """
    names = ("tokens", "picked", "targets", "weights", "segments")
    arrays = {name: getattr(batch, name) for name in names}
    inputs = {name: mx.array(array) for name, array in arrays.items() if array is not None}
    inputs["cos"], inputs["sin"] = _tables(rope, batch)
    return inputs


class Dropout(nn.Module):
    """Zeroes a part `p` of its input, drawn from a key that it is given, not from a global state.

    Where it has been given none, as outside training, its input passes through.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self._key: mx.array | None = None

    def take(self, key: mx.array) -> mx.array:
        """Draw from this key next; returns another one for whoever comes after."""
        self._key, rest = mx.random.split(key)
        return rest

    def __call__(self, x: mx.array) -> mx.array:
        if self._key is None or not self.training:
            return x
        kept = mx.random.bernoulli(1 - self.p, x.shape, key=self._key)
        return mx.where(kept, x / (1 - self.p), 0)


def supervised_states(
    model: Phi3ForCausalLM,
    inputs: Mapping[str, mx.array],
    key: mx.array,
    checkpointing: bool = False,
) -> mx.array:
    """What the output head sees at the places to learn from, `[n, hidden]`.

    Equal to running each example by itself: attention and positions stay inside it.

    Args:
        inputs: from `inputs_of`.
        key: from `mx.random.key`; what dropout draws follows from it alone.
        checkpointing: keep only each layer's input for the way back, and compute the rest again.
    """
    mask: mx.array | str = "causal"
    if "segments" in inputs:
        columns = mx.arange(inputs["tokens"].shape[1])
        same = inputs["segments"][:, :, None] == inputs["segments"][:, None, :]
        mask = (same & (columns[:, None] >= columns[None]))[:, None]  # [rows, 1, length, length]
    x = model.model.embed_tokens(inputs["tokens"])
    for layer, layer_key in zip(model.layers, mx.random.split(key, len(model.layers)), strict=True):
        x = _run(layer, x, inputs["cos"], inputs["sin"], mask, layer_key, checkpointing)
    x = x.reshape(-1, x.shape[-1])[inputs["picked"]]
    return model.model.norm(x)


def head_of(model: Phi3ForCausalLM) -> nn.Module:
    """The layer whose weight makes logits of hidden states."""
    return model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head


def _run(
    layer: DecoderLayer,
    x: mx.array,
    cos: mx.array,
    sin: mx.array,
    mask: mx.array | str,
    key: mx.array,
    checkpointing: bool,
) -> mx.array:
    def call(parameters: dict[str, Any], x: mx.array, key: mx.array) -> mx.array:
        layer.update(parameters)
        # The same key when it is called again on the way back, or other numbers would be dropped.
        for module in layer.modules():
            if isinstance(module, Dropout):
                key = module.take(key)
        return layer(x, cos, sin, mask, None)

    if checkpointing:
        call = mx.checkpoint(call)
    return call(layer.trainable_parameters(), x, key)


def _tables(rope: Rope, batch: Batch) -> tuple[mx.array, mx.array]:
    positions = mx.array(batch.positions)
    if rope.long_factor is None:
        return rope(positions, (False,))
    long = batch.lengths > rope.original_max_position_embeddings  # [rows, length]
    if not long.any() or long[batch.lengths > 0].all():
        return rope(positions, (bool(long.any()),))
    chosen = mx.array(np.ascontiguousarray(long))[:, None, :, None]
    short_tables, long_tables = rope(positions, (False,)), rope(positions, (True,))
    cos, sin = (
        mx.where(chosen, longer, shorter)
        for longer, shorter in zip(long_tables, short_tables, strict=True)
    )
    return cos, sin
