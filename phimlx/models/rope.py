"""Rotary position embeddings, plain and LongRoPE: cos and sin, made once per forward pass."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from phimlx.machine.device import on_gpu


@dataclass(frozen=True)
class Rope:
    """Frequencies of one model.

    `short_factor` and `long_factor` divide the inverse frequencies, one number for each of the
    `dims / 2` frequencies. A row uses the long ones for its *whole* sequence as soon as that is
    longer than `original_max_position_embeddings`, and the short ones until then. Without factors
    (`long_factor` None) every length uses the same frequencies.

    Source: LongRoPE (arXiv 2402.13753); transformers `modeling_rope_utils.py`,
    `_compute_longrope_parameters` and `longrope_frequency_update`.
    """

    dims: int
    theta: float
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0

    def is_long(self, length: int) -> bool:
        """Whether a sequence of `length` tokens uses the long factors."""
        return self.long_factor is not None and length > self.original_max_position_embeddings

    @cached_property
    def short_inverse_frequencies(self) -> mx.array:
        return mx.array(_inverse_frequencies(self.dims, self.theta, self.short_factor))

    @cached_property
    def long_inverse_frequencies(self) -> mx.array:
        return mx.array(_inverse_frequencies(self.dims, self.theta, self.long_factor))

    def __call__(self, positions: mx.array, long: Sequence[bool]) -> tuple[mx.array, mx.array]:
        """Compute cos and sin for one forward pass.

        Args:
            positions: `[batch or 1, length]`, counted from 0 in each row.
            long: for each row of the batch, whether it uses the long factors.

        Returns:
            cos and sin, float32 `[batch or 1, 1, length, dims / 2]`, already multiplied by the
            attention factor.
        """
        if any(long) and not all(long):
            frequencies = mx.where(
                mx.array(list(long))[:, None],
                self.long_inverse_frequencies,
                self.short_inverse_frequencies,
            )  # [batch, dims / 2]
        elif any(long):
            frequencies = self.long_inverse_frequencies[None]  # [1, dims / 2]
        else:
            frequencies = self.short_inverse_frequencies[None]
        angles = positions.astype(mx.float32)[:, None, :, None] * frequencies[:, None, None, :]
        return mx.cos(angles) * self.attention_factor, mx.sin(angles) * self.attention_factor


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn the first `2 * cos.shape[-1]` channels of each head; pass the rest through.

    Args:
        x: `[batch, heads, length, head_dim]`.
        cos, sin: `[batch or 1, 1, length, dims / 2]`, float32.

    The products are taken in float32 whatever the dtype of `x`, and rounded to it once.
    """
    half = cos.shape[-1]
    first, second = _turn(x[..., :half], x[..., half : 2 * half], cos, sin)
    return mx.concatenate([first, second, x[..., 2 * half :]], axis=-1)


def fuse(function: Callable[..., Any]) -> Callable[..., Any]:
    """`mx.compile` an elementwise function for a GPU.

    On the CPU backend compiling would start a C++ compiler, which may not be there and costs more
    than it saves, so there the function runs as it is written.
    """
    compiled = mx.compile(function, shapeless=True)

    def call(*arrays: mx.array) -> Any:
        return (compiled if on_gpu() else function)(*arrays)

    return call


@fuse
def _turn(
    first: mx.array, second: mx.array, cos: mx.array, sin: mx.array
) -> tuple[mx.array, mx.array]:
    return (
        (first * cos - second * sin).astype(first.dtype),
        (second * cos + first * sin).astype(first.dtype),
    )


def _inverse_frequencies(dims: int, theta: float, factors: Sequence[float] | None) -> list[float]:
    """1 / (factor · theta^(2i / dims)), every step rounded to float32 as the reference rounds it.

    At position 8192 one unit in the last place of a frequency is a phase of 5e-4, so the roundings
    are part of the definition. A power is rounded to the nearest float32, as torch does for a
    single number; its vectorized one misses that by one unit for 1 of Phi-4-mini's 48.
    """
    factors = factors or [1.0] * (dims // 2)
    powers = [_float32(theta ** _float32(2 * i / dims)) for i in range(dims // 2)]
    return [
        _float32(1.0 / _float32(_float32(factor) * power))
        for factor, power in zip(factors, powers, strict=True)
    ]


def _float32(value: float) -> float:
    """The float32 nearest to `value`."""
    return struct.unpack("f", struct.pack("f", value))[0]


def longrope_attention_factor(factor: float, original_max_position_embeddings: int) -> float:
    """√(1 + ln(factor) / ln(original)), the scale of cos and sin with either factors."""
    if factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_max_position_embeddings))
