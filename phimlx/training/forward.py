"""A batch of examples -> the model's hidden states where something is to be learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from phimlx.models.base import CausalLM, ForwardPass
from phimlx.models.lora import Routing
from phimlx.models.rope import Rope
from phimlx.training.data.batches import Batch


def inputs_of(batch: Batch, rope: Rope) -> dict[str, mx.array]:
    """Hand a batch to the device.

    Returns:
        tokens, positions, target_indices, targets, weights and, of packed rows, segments as in
        `Batch`; cos and sin, as a `Rope` makes them, from the table that each example's own length
        calls for.
    """
    names = ("tokens", "positions", "target_indices", "targets", "weights", "segments")
    arrays = {name: getattr(batch, name) for name in names}
    inputs = {name: mx.array(array) for name, array in arrays.items() if array is not None}
    inputs["cos"], inputs["sin"] = rope.by_token(mx.array(batch.positions), batch.lengths)
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
    model: CausalLM,
    inputs: Mapping[str, mx.array],
    key: mx.array,
    checkpointing: bool = False,
) -> mx.array:
    """Compute what the output head sees at the places to learn from, `[n, hidden]`.

    Equal to running each example by itself: attention and positions stay inside it.

    Args:
        inputs: from `inputs_of`.
        key: from `mx.random.key`; what dropout draws follows from it alone.
        checkpointing: keep only each layer's input for the backward pass; compute the rest again.
    """
    mask = _mask(inputs, model.config.sliding_window)
    x = model.embed(inputs["tokens"])
    adapter = model.default_adapter  # one that the model was loaded with, where it is measured
    routing = None if adapter is None else Routing([adapter] * x.shape[0])
    rope = inputs["cos"], inputs["sin"]
    forward = ForwardPass(inputs["positions"], mask, rope, routing=routing)
    for layer, layer_key in zip(model.layers, mx.random.split(key, len(model.layers)), strict=True):
        x = _run(layer, x, forward, layer_key, checkpointing)
    x = x.reshape(-1, x.shape[-1])[inputs["target_indices"]]
    return model.norm(x)


def _mask(inputs: Mapping[str, mx.array], window: int | None) -> mx.array | str:
    """Make the mask of attention inside each example, in the model's window where it has one."""
    length = inputs["tokens"].shape[1]
    if "segments" not in inputs and (window is None or length <= window):
        return "causal"
    columns = mx.arange(length)
    seen = columns[:, None] >= columns[None]
    if window is not None:
        seen = seen & (columns[:, None] - columns[None] < window)
    if "segments" not in inputs:
        return seen
    same = inputs["segments"][:, :, None] == inputs["segments"][:, None, :]
    return (same & seen)[:, None]  # [rows, 1, length, length]


def _run(
    layer: nn.Module,
    x: mx.array,
    forward: ForwardPass,
    key: mx.array,
    checkpointing: bool,
) -> mx.array:
    """Run a layer as a function of all that it depends on, as `mx.checkpoint` needs it."""

    def call(
        parameters: dict[str, Any], x: mx.array, key: mx.array, shared: dict[str, Any]
    ) -> tuple[mx.array, dict[str, Any]]:
        layer.update(parameters)
        forward.shared = dict(shared)
        # The same key when it is called again backward, or other numbers would be dropped.
        for module in layer.modules():
            if isinstance(module, Dropout):
                key = module.take(key)
        x = layer(x, forward)
        # Copies, since MLX loses gradients where one array is returned twice.
        return x, tree_map(lambda array: array + 0, forward.shared)

    if checkpointing:
        call = mx.checkpoint(call)
    x, forward.shared = call(layer.trainable_parameters(), x, key, forward.shared)
    return x
