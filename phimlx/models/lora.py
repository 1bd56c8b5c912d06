"""Linear layers with low-rank adapters beside them, chosen row by row in every call.

The layer below may be quantized: nothing is ever merged into it.
Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353, equation 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

MAX_RANK = 1 << 14  # a hostile config must not make us build more


@dataclass(frozen=True)
class LoRA:
    """One layer's adapter: scale · B A beside its weight, and for DoRA the length of each row.

    Attributes:
        lora_a: A transposed, `[input, rank]`.
        lora_b: B transposed, `[rank, output]`.
        magnitude: `[output]`; None for LoRA.
    """

    lora_a: mx.array
    lora_b: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def rank(self) -> int:
        return self.lora_a.shape[1]

    def delta(self, first: int = 0, last: int | None = None) -> mx.array:
        """Multiply scale · B A in float32, `[output, input]`: rows `first` up to `last`."""
        b, a = self.lora_b[:, first:last], self.lora_a
        return (self.scale * b.astype(mx.float32).T) @ a.astype(mx.float32).T

    def merged(self, weight: mx.array, first: int = 0) -> mx.array:
        """Merge the adapter into rows of a layer's weight, from number `first` on; float32."""
        last = first + weight.shape[0]
        merged = weight.astype(mx.float32) + self.delta(first, last)
        if self.magnitude is None:
            return merged
        gain = self.magnitude[first:last] / mx.linalg.norm(merged, axis=1)
        return gain[:, None] * merged


class Routing:
    """Adapters of the rows of one forward pass.

    Args:
        rows: for each row of the batch the name of its adapter, or None.
    """

    def __init__(self, rows: Sequence[str | None]) -> None:
        names = dict.fromkeys(name for name in rows if name is not None)
        # The rows of each adapter; None where they are all.
        self.groups: tuple[tuple[str, mx.array | None], ...] = tuple(
            (name, _rows_of(name, rows)) for name in names
        )


def _rows_of(name: str, rows: Sequence[str | None]) -> mx.array | None:
    chosen = [index for index, row in enumerate(rows) if row == name]
    return None if len(chosen) == len(rows) else mx.array(chosen)


class LoRALinear(nn.Module):
    """A linear layer with named adapters as side paths; parameters carry peft's names.

    Args:
        base_layer: plain or quantized.
        always: the adapter that every row uses, whatever the routing; None for none.
    """

    def __init__(self, base_layer: nn.Module, always: str | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A: dict[str, nn.Module] = {}
        self.lora_B: dict[str, nn.Module] = {}
        self._scales: dict[str, float] = {}
        self._gains: dict[str, mx.array] = {}  # of DoRA: magnitude / row lengths, `[output]`
        self._always = always

    @classmethod
    def empty(
        cls, input_dims: int, output_dims: int, adapters: Mapping[str, tuple[int, float]]
    ) -> LoRALinear:
        """Make a layer whose weights are to be loaded, with adapters of a rank and a scale each."""
        layer = cls(nn.Linear(input_dims, output_dims, bias=False))
        for name, (rank, scale) in adapters.items():
            layer.lora_A[name] = nn.Linear(input_dims, rank, bias=False)
            layer.lora_B[name] = nn.Linear(rank, output_dims, bias=False)
            layer._scales[name] = scale
        return layer

    @classmethod
    def adapted(cls, base_layer: nn.Module, lora: LoRA) -> LoRALinear:
        """Put an adapter beside a layer, which every row uses."""
        layer = cls(base_layer, always="default")
        for part, matrix in ((layer.lora_A, lora.lora_a), (layer.lora_B, lora.lora_b)):
            part["default"] = nn.Linear(1, 1, bias=False)
            part["default"].weight = mx.contiguous(matrix.T)
        layer._scales["default"] = lora.scale
        if lora.magnitude is not None:
            merged = dequantized_weight(base_layer) + lora.delta()
            layer._gains["default"] = lora.magnitude / mx.linalg.norm(merged, axis=1)
            mx.eval(layer._gains)  # now: a whole weight is unpacked for it
        return layer

    def __call__(self, x: mx.array, routing: Routing | None = None) -> mx.array:
        """`[batch, length, input]` to `[batch, length, output]`."""
        y = self.base_layer(x)
        if self._always is not None:
            y = self._with(self._always, x, y)
        for name, rows in () if routing is None else routing.groups:
            if name not in self._scales:
                continue
            if rows is None:
                y = self._with(name, x, y)
            else:
                y[rows] = self._with(name, x[rows], y[rows])
        return y

    def _with(self, name: str, x: mx.array, y: mx.array) -> mx.array:
        inner = self.lora_A[name](x) * self._scales[name]  # [rows, length, rank]
        y = y + self.lora_B[name](inner).astype(y.dtype)
        gain = self._gains.get(name)
        if gain is None:
            return y
        gain = gain.astype(y.dtype)
        if "bias" not in self.base_layer:
            return y * gain
        bias = self.base_layer.bias  # which DoRA leaves as it is
        return (y - bias) * gain + bias


def project(layer: nn.Module, x: mx.array, routing: Routing | None) -> mx.array:
    """Call a projection; only one with adapters is ever given a routing."""
    return layer(x, routing) if routing is not None and isinstance(layer, LoRALinear) else layer(x)


def dequantized_weight(linear: nn.Module) -> mx.array:
    """Read a linear layer's weight in float32, `[output, input]`, however it is stored."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight.astype(mx.float32)
    weight = mx.dequantize(
        linear.weight,
        linear.scales,
        linear.get("biases"),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    )
    return weight.astype(mx.float32)


def input_dims(linear: nn.Module) -> int:
    """Tell the width that a linear layer takes, however its weight is stored."""
    width = linear.weight.shape[-1]
    return width * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else width
