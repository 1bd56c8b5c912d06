"""Rotary position embeddings, plain, LongRoPE or scaled: cos and sin, once per forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from phimlx.machine.device import on_gpu
from phimlx.models.rope_scaling import Scaling, float32, powers

KEPT = 64  # tables of frequencies


@dataclass(frozen=True)
class Rope:
    """Frequencies of one model.

    `short_factor` and `long_factor` divide the inverse frequencies, one number for each of the
    `dims / 2` frequencies. A row uses the long ones for its *whole* sequence as soon as that is
    longer than `original_max_position_embeddings`, and the short ones until then. Without factors
    (`long_factor` None) and without a scaling every length uses the same frequencies.

    Source: LongRoPE (arXiv 2402.13753); transformers `modeling_rope_utils.py`,
    `_compute_longrope_parameters` and `longrope_frequency_update`.
    """

    dims: int
    theta: float
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    scaling: Scaling | None = None

    def is_long(self, length: int) -> bool:
        """Whether a sequence of `length` tokens uses the long factors."""
        return self.long_factor is not None and length > self.original_max_position_embeddings

    def table(self, length: int) -> int:
        """Tell the frequencies that a sequence of `length` tokens uses.

        Returns:
            0 as long as it is not longer than the model was trained with; the same number for
            lengths that use the same.
        """
        if self.scaling is None or not self.scaling.follows_length:
            return int(self.is_long(length))
        return length if length > self.scaling.original else 0

    def goes_on(self, held: int, table: int, added: int) -> bool:
        """Whether so many tokens more can follow keys that were made with another table.

        Where frequencies follow the length, a reply's next token does, as in transformers'
        `generate`: what is there stays as it is. Several tokens at once are a prompt, of which each
        is computed with the frequencies of the whole.
        """
        follows = self.scaling is not None and self.scaling.follows_length
        return held == table or (follows and added == 1)

    def serves(self, held: int, table: int) -> bool:
        """Whether keys that replies have added to are those that one pass would make."""
        follows = self.scaling is not None and self.scaling.follows_length
        return held == table and not (follows and held)

    def inverse_frequencies(self, table: int) -> mx.array:
        """Give the inverse frequencies of a table, float32 `[dims / 2]`."""
        if table not in self._made:
            if self.scaling is not None:
                found = self.scaling.inverse_frequencies(self.dims, self.theta, table)
            else:
                factors = self.long_factor if table else self.short_factor
                found = _inverse_frequencies(self.dims, self.theta, factors)
            if len(self._made) > KEPT:
                self._made.clear()
            self._made[table] = mx.array(found)
        return self._made[table]

    @cached_property
    def _made(self) -> dict[int, mx.array]:
        return {}

    def __call__(self, positions: mx.array, tables: Sequence[int]) -> tuple[mx.array, mx.array]:
        """Compute cos and sin for one forward pass.

        Args:
            positions: `[batch or 1, length]`, counted from 0 in each row.
            tables: that of each row of the batch, or one for all.

        Returns:
            cos, float32 `[batch or 1, 1, length, 1, dims / 2]`, and sin, `[…, 2, dims / 2]`, below
            zero for the first half of the channels; already multiplied by the attention factor.
        """
        used = tables if len({*tables}) > 1 else tables[:1]
        frequencies = mx.stack([self.inverse_frequencies(table) for table in used])
        return self._turns(positions, frequencies[:, None])

    def by_token(self, positions: mx.array, lengths: np.ndarray) -> tuple[mx.array, mx.array]:
        """Compute cos and sin where several sequences stand in a row.

        Args:
            positions: `[batch, length]`, counted from 0 in each sequence.
            lengths: of the sequence that each token is in, 0 for padding, `[batch, length]`.
        """
        distinct, index = np.unique(lengths, return_inverse=True)
        tables = [self.table(int(length)) for length in distinct]
        if len({*tables[int(distinct[0] == 0) :]}) <= 1:
            return self(positions, tables[-1:])
        frequencies = mx.stack([self.inverse_frequencies(table) for table in tables])
        return self._turns(positions, frequencies[mx.array(index.reshape(lengths.shape))])

    def _turns(self, positions: mx.array, frequencies: mx.array) -> tuple[mx.array, mx.array]:
        """Multiply positions and frequencies, `[batch or 1, length or 1, dims / 2]`."""
        angles = (positions.astype(mx.float32)[..., None] * frequencies)[:, None, :, None]
        cos, sin = mx.cos(angles) * self.attention_factor, mx.sin(angles) * self.attention_factor
        return cos, mx.concatenate([-sin, sin], axis=-2)


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn the first `2 * cos.shape[-1]` channels of each head; pass the rest through.

    Channel i turns with channel i + dims / 2, so the halves are seen a second time the other way
    round, which is a view, and all is one multiply-add. Gathering them would copy them first.

    Args:
        x: `[batch, heads, length, head_dim]`.
        cos, sin: of a `Rope`, float32 `[batch or 1, 1, length, 1 or 2, dims / 2]`.

    The products are taken in float32 whatever the dtype of `x`, and rounded to it once.
    """
    half = cos.shape[-1]
    halves = mx.unflatten(x[..., : 2 * half], -1, (2, half))  # [batch, heads, length, 2, dims / 2]
    turned = _turn(halves, halves[..., ::-1, :], cos, sin).flatten(-2)
    rest = x[..., 2 * half :]
    return mx.concatenate([turned, rest], axis=-1) if rest.size else turned


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
def _turn(x: mx.array, other: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return (x * cos + other * sin).astype(x.dtype)


def _inverse_frequencies(dims: int, theta: float, factors: Sequence[float] | None) -> list[float]:
    """1 / (factor · theta^(2i / dims)), every step rounded to float32 as the reference rounds it.

    At position 8192 one unit in the last place of a frequency is a phase of 5e-4, so the roundings
    are part of the definition.
    """
    factors = factors or [1.0] * (dims // 2)
    return [
        float32(1.0 / float32(float32(factor) * power))
        for factor, power in zip(factors, powers(dims, theta), strict=True)
    ]


def longrope_attention_factor(factor: float, original_max_position_embeddings: int) -> float:
    """√(1 + ln(factor) / ln(original)), the scale of cos and sin with either factors."""
    if factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_max_position_embeddings))
