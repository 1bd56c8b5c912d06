"""A linear layer with one low-rank adapter beside it, LoRA or DoRA, for inference.

Knows weights; knows nothing of adapter files, nor of training.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class LowRank:
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
        """scale · B A in float32, `[output, input]`: its rows `first` to `last` (not included)."""
        b, a = self.lora_b[:, first:last], self.lora_a
        return (self.scale * b.astype(mx.float32).T) @ a.astype(mx.float32).T

    def merged(self, weight: mx.array, first: int = 0) -> mx.array:
        """Rows of a layer's weight, from number `first` on, with the adapter in them; float32."""
        last = first + weight.shape[0]
        merged = weight.astype(mx.float32) + self.delta(first, last)
        if self.magnitude is None:
            return merged
        gain = self.magnitude[first:last] / mx.linalg.norm(merged, axis=1)
        return gain[:, None] * merged


class AdaptedLinear(nn.Module):
    """gain · (W x + scale · B A x), with a gain for DoRA alone.

    The base may be quantized: nothing is merged into it.

    Args:
        base_layer: a linear layer without bias, plain or quantized.

    Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353, equation 5.
    """

    def __init__(self, base_layer: nn.Module, adapter: LowRank) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a = adapter.lora_a
        self.lora_b = adapter.lora_b * adapter.scale
        if adapter.magnitude is not None:
            merged = plain_weight(base_layer) + adapter.delta()
            self.gain = adapter.magnitude / mx.linalg.norm(merged, axis=1)

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., input]` to `[..., output]`."""
        y = self.base_layer(x)
        y = y + ((x @ self.lora_a) @ self.lora_b).astype(y.dtype)
        return y * self.gain.astype(y.dtype) if "gain" in self else y


def plain_weight(linear: nn.Module) -> mx.array:
    """A linear layer's weight in float32, `[output, input]`, however it is stored."""
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
    """The width that a linear layer takes, however its weight is stored."""
    width = linear.weight.shape[-1]
    return width * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else width
