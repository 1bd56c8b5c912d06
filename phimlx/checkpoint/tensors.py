"""Tensors of a model whose rows can be read a few at a time, whichever way they are stored."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from phimlx.errors import CheckpointError

# Element types that a parameter may be stored in, by safetensors' names.
STORED_DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
FLOATING_DTYPES = ("F32", "F16", "BF16")
PACKED_DTYPES = {mx.uint32: ("U32",), mx.uint8: ("U8",)}
# Element types that stored bytes can be read as; MLX has no floating-point numbers of 8 bits.
ELEMENT_DTYPES = {
    **STORED_DTYPES,
    "I64": mx.int64,
    "I32": mx.int32,
    "I16": mx.int16,
    "I8": mx.int8,
    "U64": mx.uint64,
    "U16": mx.uint16,
    "BOOL": mx.bool_,
    "F8_E4M3": mx.uint8,
    "F8_E5M2": mx.uint8,
    "F8_E8M0": mx.uint8,
}


class Tensor(ABC):
    """A tensor of a model: rows that are made of rows of stored tensors.

    Its `repr` tells all that decides its values but the bytes of its files: a conversion that is
    taken up again is known by it.

    Attributes:
        shape: of what its rows make, which need not be that of anything stored.
        dtype: of what its rows make, by safetensors' name.
    """

    shape: tuple[int, ...]
    dtype: str

    @abstractmethod
    def reads(self, first: int, last: int) -> tuple[StoredRows, ...]:
        """List what must be read for rows `first` to `last` (not included)."""

    @abstractmethod
    def rows(self, first: int, last: int, parts: Sequence[mx.array]) -> mx.array:
        """Make these rows.

        Args:
            parts: the arrays of what `reads` lists for the same rows, in its order.

        Returns:
            `[last - first, *shape[1:]]`, of `dtype`; a tensor of no dimension has one row, `[]`.
        """

    @property
    def count(self) -> int:
        """How many rows it has; one of no dimension has one."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Bytes of what its rows make."""
        return math.prod(self.shape) * ELEMENT_DTYPES[self.dtype].size

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; a tensor of one dimension has a row for each number."""
        return self.nbytes // (self.count or 1)

    def whole(self, load: Callable[[StoredRows], mx.array]) -> mx.array:
        """Make all of its rows.

        Args:
            load: gives the array of stored rows.
        """
        return self.rows(0, self.count, [load(rows) for rows in self.reads(0, self.count)])


Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class TensorInfo(Tensor):
    """One stored tensor, as its file's header describes it.

    Attributes:
        dtype: safetensors' name: BF16, F32, U32 …
        name: under which it is stored, in a dialect whose names are not the model's.
        offset: where in the file its bytes begin.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    name: str
    offset: int

    def reads(self, first: int, last: int) -> tuple[StoredRows, ...]:
        return (StoredRows(self, first, last),)

    def rows(self, first: int, last: int, parts: Sequence[mx.array]) -> mx.array:
        return parts[0]


@dataclass(frozen=True)
class StoredRows:
    """Rows `first` to `last` (not included) of a stored tensor."""

    info: TensorInfo
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return (self.last - self.first) * self.info.row_bytes

    @property
    def offset(self) -> int:
        """Where in the file their bytes begin."""
        return self.info.offset + self.first * self.info.row_bytes

    def array(self, data: bytes | bytearray | memoryview) -> mx.array:
        """Copy their bytes into an array `[last - first, ...]` of the stored type."""
        words = mx.array(memoryview(data))  # type: ignore[arg-type]
        shape = (self.last - self.first, *self.info.shape[1:]) if self.info.shape else ()
        return words.view(ELEMENT_DTYPES[self.info.dtype]).reshape(shape)

    def read(self) -> bytes:
        """Read their bytes from the file.

        Raises:
            CheckpointError: where the file ends before they do.
        """
        data = bytearray(self.nbytes)
        with self.info.file.open("rb") as file:
            self.read_into(file.fileno(), memoryview(data))
        return bytes(data)

    def read_into(self, descriptor: int, buffer: memoryview) -> None:
        """Read their bytes from the opened file to a buffer of that size.

        Raises:
            CheckpointError: where the file ends before they do.
        """
        begin = self.offset
        while buffer:
            count = os.preadv(descriptor, [buffer], begin)
            if count == 0:
                raise CheckpointError(
                    f"{self.info.file.name} ends within {self.info.name}: it was changed while it "
                    "was read.",
                    hint="Download or convert the model again.",
                )
            buffer, begin = buffer[count:], begin + count


@dataclass(frozen=True)
class PartialTensor(Tensor):
    """Some rows of another tensor, from number `first` on."""

    tensor: Tensor
    first: int
    length: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.length, *self.tensor.shape[1:])

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.tensor.dtype

    def reads(self, first: int, last: int) -> tuple[StoredRows, ...]:
        return self.tensor.reads(self.first + first, self.first + last)

    def rows(self, first: int, last: int, parts: Sequence[mx.array]) -> mx.array:
        return self.tensor.rows(self.first + first, self.first + last, parts)


@dataclass(frozen=True)
class JoinedTensor(Tensor):
    """A tensor of several others, the rows of each below those of the one before it."""

    pieces: tuple[Tensor, ...]

    @classmethod
    def of(cls, name: str, pieces: Tensors) -> JoinedTensor:
        """Join pieces, in order.

        Args:
            name: of the joined tensor.

        Raises:
            CheckpointError: where they have other widths or types.
        """
        forms = {(piece.shape[1:], piece.dtype) for piece in pieces.values()}
        if len(forms) > 1 or not all(piece.shape for piece in pieces.values()):
            parts = ", ".join(
                f"{part} {piece.dtype} {list(piece.shape)}" for part, piece in pieces.items()
            )
            raise CheckpointError(
                f"{name} cannot be joined from parts of other widths or types: {parts}.",
                hint="Use the original model, whose parts are stored alike.",
            )
        return cls(tuple(pieces.values()))

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (sum(piece.count for piece in self.pieces), *self.pieces[0].shape[1:])

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.pieces[0].dtype

    def reads(self, first: int, last: int) -> tuple[StoredRows, ...]:
        return tuple(
            rows
            for piece, begin, end in self._overlaps(first, last)
            for rows in piece.reads(begin, end)
        )

    def rows(self, first: int, last: int, parts: Sequence[mx.array]) -> mx.array:
        made, used = [], 0
        for piece, begin, end in self._overlaps(first, last):
            count = len(piece.reads(begin, end))
            made.append(piece.rows(begin, end, parts[used : used + count]))
            used += count
        return made[0] if len(made) == 1 else mx.concatenate(made)

    def _overlaps(self, first: int, last: int) -> list[tuple[Tensor, int, int]]:
        """The pieces that these rows lie in, and which rows of each."""
        found, top = [], 0
        for piece in self.pieces:
            begin, end = max(first - top, 0), min(last - top, piece.count)
            if begin < end:
                found.append((piece, begin, end))
            top += piece.count
        return found or [(self.pieces[0], 0, 0)]
