"""Tensors of GGUF files, whose rows are unpacked as they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from phimlx.checkpoint.gguf.blocks import BlockType
from phimlx.checkpoint.tensors import STORED_DTYPES, StoredRows, Tensor, TensorInfo


@dataclass(frozen=True)
class PackedTensor(Tensor):
    """A tensor of packed numbers.

    Attributes:
        info: its rows as bytes, `[rows, bytes of one]`.
        type: how numbers are packed in them.
        dtype: that they become, rounded once.
    """

    info: TensorInfo
    type: BlockType
    shape: tuple[int, ...]
    dtype: str

    def reads(self, first: int, last: int) -> tuple[StoredRows, ...]:
        return (StoredRows(self.info, first, last),)

    def rows(self, first: int, last: int, parts: Sequence[mx.array]) -> mx.array:
        width = math.prod(self.shape[1:])
        numbers = self.type.decode(parts[0].reshape(-1), width)
        return numbers.reshape(last - first, *self.shape[1:]).astype(STORED_DTYPES[self.dtype])


@dataclass(frozen=True)
class UnpairedTensor(Tensor):
    """Queries or keys whose rows are stored in the order in which they turn, head by head.

    In a head of n numbers that is 0, n / 2, 1, n / 2 + 1, … Source: llama.cpp,
    convert_hf_to_gguf.py, `LlamaModel.permute`, which this undoes.

    Attributes:
        head_dim: numbers of a head, which divide the rows.
    """

    tensor: Tensor
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.tensor.shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.tensor.dtype

    def reads(self, first: int, last: int) -> tuple[StoredRows, ...]:
        return self.tensor.reads(*self._heads(first, last))

    def rows(self, first: int, last: int, parts: Sequence[mx.array]) -> mx.array:
        top, end = self._heads(first, last)
        stored = self.tensor.rows(top, end, parts)
        pairs = stored.reshape(-1, self.head_dim // 2, 2, *self.shape[1:])
        return pairs.swapaxes(1, 2).reshape(stored.shape)[first - top : last - top]

    def _heads(self, first: int, last: int) -> tuple[int, int]:
        """First and last row of the heads that these rows lie in."""
        size = self.head_dim
        return first // size * size, -(-last // size) * size
