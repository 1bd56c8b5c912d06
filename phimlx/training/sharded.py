"""Adapters beside layers that several machines share, and how they are whole on the disk.

What goes into a layer or comes out of it is the same on all machines or is shared by them, as MLX's
own sharded layers have it; one of an adapter's matrices is shared with the layer, the other one is
the same everywhere. Gradients are whole on each machine, so that no others are summed.
Source: Megatron-LM, arXiv 1909.08053, section 3, of which an adapter is a narrow layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import sum_gradients
from mlx.utils import tree_flatten

from phimlx.models.base import CausalLM
from phimlx.models.lora import dequantized_weight
from phimlx.models.shares import Share

Arrays = dict[str, mx.array]
SharedAxes = Mapping[str, tuple[Share, int]]
"""The trained parameters of which a machine has a share, by name: which, and along which axis."""


class ShardedLoRA(nn.Module):
    """A LoRA or DoRA beside a machine's share of a linear layer.

    Parameters carry the names of mlx-lm's LoRALinear and DoRALinear, and compute what these do.

    Args:
        linear: one of MLX's sharded layers, plain or quantized.
        lora_a: of the whole layer, `[input, rank]`; the other matrix begins as zeros.
        is_dora: whether a magnitude is trained, which begins as the length of each row.
    """

    def __init__(
        self,
        linear: nn.Module,
        share: Share,
        lora_a: mx.array,
        scale: float,
        is_dora: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.share = share
        self.lora_a = lora_a if share.by_rows else share.part(lora_a, 0)
        self.lora_b = mx.zeros((lora_a.shape[1], linear.weight.shape[0]))
        self.scale = scale
        self.dropout: nn.Module = nn.Identity()
        if is_dora:
            self.m = self._lengths(dequantized_weight(linear))

    @property
    def shared_axes(self) -> dict[str, int]:
        """The axis along which each parameter is shared, of those that are."""
        return {"lora_b": 1, "m": 0} if self.share.by_rows else {"lora_a": 0}

    def __call__(self, x: mx.array) -> mx.array:
        """`[batch, length, input]` to `[batch, length, output]`, one of them a share."""
        gather = sum_gradients(self.share.group) if self.share.by_rows else self._sum
        inner = gather(self.dropout(x) @ self.lora_a)  # [batch, length, rank]
        delta = (self.scale * (inner @ self.lora_b)).astype(x.dtype)
        y = self.linear(x)
        if "m" not in self:
            return y + delta
        weight = dequantized_weight(self.linear)
        adapted = weight + (self.scale * self.lora_b.T) @ self.lora_a.T
        gain = (self.m / mx.stop_gradient(self._lengths(adapted))).astype(x.dtype)
        if "bias" not in self.linear:
            return (y + delta) * gain
        bias = self.linear.bias  # which DoRA leaves as it is
        return (y - bias + delta) * gain + bias

    def _lengths(self, weight: mx.array) -> mx.array:
        """Compute the length of each whole row of a part of a weight, `[output]`."""
        if self.share.by_rows:
            return mx.linalg.norm(weight, axis=1)
        return mx.sqrt(self._sum(weight.square().sum(axis=1)))

    def _sum(self, array: mx.array) -> mx.array:
        return mx.distributed.all_sum(array, group=self.share.group)


def shared_axes(model: CausalLM) -> SharedAxes:
    """List the trained parameters of which this machine has a share; none of a whole model."""
    return {
        f"{path}.{name}": (module.share, axis)
        for path, module in model.named_modules()
        if isinstance(module, ShardedLoRA)
        for name, axis in module.shared_axes.items()
    }


def _axis_of(name: str, axes: SharedAxes) -> tuple[Share, int] | None:
    """Find how a parameter, or what an optimizer keeps of it under its name, is shared."""
    return axes.get(name) or axes.get(name.rpartition(".")[0])


def whole(tree: Any, axes: SharedAxes) -> Arrays:
    """Put the arrays of a model or of an optimizer together from all machines' parts, by name.

    All machines call it together.
    """
    arrays: Arrays = dict(tree_flatten(tree))
    for name, array in arrays.items():
        if (found := _axis_of(name, axes)) is not None:
            share, axis = found
            arrays[name] = share.whole(array, axis)
            mx.eval(arrays[name])
    return arrays


def whole_shapes(tree: Any, axes: SharedAxes) -> dict[str, tuple[int, ...]]:
    """Tell the shapes of what `whole` makes, by name."""
    shapes = {}
    arrays: Arrays = dict(tree_flatten(tree))
    for name, array in arrays.items():
        found = _axis_of(name, axes)
        shapes[name] = array.shape if found is None else found[0].whole_shape(array, found[1])
    return shapes


def parts(arrays: Arrays, axes: SharedAxes) -> Arrays:
    """Take this machine's parts of arrays by name."""
    found = dict(arrays)
    for name, array in arrays.items():
        if (shared := _axis_of(name, axes)) is not None:
            share, axis = shared
            found[name] = share.part(array, axis)
    return found
