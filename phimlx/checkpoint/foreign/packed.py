"""What the formats of other frameworks have in common: layers, packed weights, fields of bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from phimlx.checkpoint.tensors import STORED_DTYPES, StoredRows, Tensor, TensorInfo
from phimlx.errors import CheckpointError, shortened


@dataclass(frozen=True)
class PackedLayer:
    """The stored tensors of one layer that another framework has packed.

    Attributes:
        framework: that packed it, as messages name it.
        path: under which its tensors are stored.
        parts: what stands behind the path -> the tensor.
        width: numbers in a row of its weight, as config.json has it.
        dtype: of the model, which config.json names; None where it does not.
    """

    framework: str
    path: str
    parts: Mapping[str, TensorInfo]
    width: int
    dtype: str | None

    def part(self, name: str, *dtypes: str, ndim: int | None = None) -> TensorInfo:
        """Take a part that the format needs.

        Args:
            dtypes: that it may have; any where none is named.

        Raises:
            CheckpointError: where it is missing, or of another type or number of dimensions.
        """
        info = self.parts.get(name)
        if info is None:
            raise self.misfit(f"it lacks {name}")
        if dtypes and info.dtype not in dtypes:
            raise self.misfit(f"{name} is stored as {info.dtype}, not {' or '.join(dtypes)}")
        if ndim is not None and len(info.shape) != ndim:
            raise self.misfit(f"{name} has shape {list(info.shape)}")
        return info

    def check(self, name: str, *shapes: tuple[int, ...]) -> None:
        """Raise CheckpointError where a part has none of these shapes."""
        shape = self.parts[name].shape
        if shape not in shapes:
            wanted = " or ".join(str(list(each)) for each in dict.fromkeys(shapes))
            raise self.misfit(f"{name} has shape {list(shape)}, not {wanted}")

    def out_dtype(self, own: str) -> str:
        """Choose the type of the decoded weight: the model's, or its scales' `own`."""
        return self.dtype or own

    def misfit(self, why: str) -> CheckpointError:
        """Make the error that says why this is not the framework's."""
        return misfit(self.framework, self.path, why)


def misfit(framework: str, path: str, why: str) -> CheckpointError:
    """Make the error that says why a layer is not packed as its framework does it."""
    path = path if len(path) <= 100 else f"{path[:97]}..."
    return CheckpointError(
        f"{path} does not fit config.json, whose quantization_config is another framework's "
        f"({framework}): {why}.",
        hint="Download the model again, or convert the original model.",
    )


@dataclass(frozen=True)
class PackedWeight(Tensor):
    """A weight that is decoded from stored tensors.

    Attributes:
        framework, path: see `PackedLayer`.
        shape: [rows, width] of the decoded weight.
        dtype: of the decoded weight.
        parts: that are needed, by what stands behind the path.
        by_rows: names of parts whose rows are the weight's; of all others all is read.
    """

    framework: str
    path: str
    shape: tuple[int, ...]
    dtype: str
    parts: Mapping[str, TensorInfo]

    by_rows: ClassVar[frozenset[str]] = frozenset()

    def reads(self, first: int, last: int) -> tuple[StoredRows, ...]:
        return tuple(
            StoredRows(info, first, last)
            if name in self.by_rows
            else StoredRows(info, 0, info.count)
            for name, info in self.parts.items()
        )

    def rows(self, first: int, last: int, parts: Sequence[mx.array]) -> mx.array:
        """Decode these rows.

        Raises:
            CheckpointError: where values of the stored tensors are impossible.
        """
        decoded = self.decode(dict(zip(self.parts, parts, strict=True)), first, last)
        return decoded.astype(STORED_DTYPES[self.dtype])

    @abstractmethod
    def decode(self, parts: Mapping[str, mx.array], first: int, last: int) -> mx.array:
        """Decode these rows to the numbers, and in the type, that the framework's library makes.

        Args:
            parts: by name, as `reads` lists them.
        """

    def misfit(self, why: str) -> CheckpointError:
        """Make the error that says why these values are not the framework's."""
        return misfit(self.framework, self.path, why)

    def group_of_each(self, index: mx.array, groups: int) -> list[int]:
        """Read which group each column is in.

        Raises:
            CheckpointError: where a group is none.
        """
        values: list[int] = index.tolist()  # type: ignore[assignment]
        if min(values) < 0 or max(values) >= groups:
            wrong = next(value for value in values if not 0 <= value < groups)
            raise self.misfit(f"a column is in group {shortened(wrong)} of {groups}")
        return values


def unpack(words: mx.array, bits: int, count: int) -> mx.array:
    """Unpack fields that follow one another from the lowest bit on, also across words.

    Args:
        words: uint32 [..., at least count * bits / 32].

    Returns:
        uint32 [..., count].
    """
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
        fields = (words[..., None] >> shifts) & mask  # [..., words, fields of a word]
        return fields.reshape(*words.shape[:-1], -1)[..., :count]
    begin = mx.arange(count, dtype=mx.uint32) * bits
    word, shift = begin // 32, begin % 32
    low = words[..., word] >> shift
    next_word = mx.minimum(word + 1, words.shape[-1] - 1)
    high = words[..., next_word] << (32 - shift) % 32
    return mx.where(shift + bits > 32, low | high, low) & mask


def words_of(array: mx.array) -> mx.array:
    """View packed numbers, which most frameworks store as signed, as uint32."""
    return array.view(mx.uint32)


def spread(groups: mx.array, width: int, group_size: int) -> mx.array:
    """Repeat a value of each group for its columns: [rows, groups] -> [rows, width].

    The last group may be shorter than the others.
    """
    return mx.repeat(groups, group_size, axis=1)[:, :width]


def scaled(numbers: mx.array, scales: mx.array) -> mx.array:
    """Multiply whole or 8-bit numbers by their scales, rounded once, to the scales' type.

    Their products fit float32 where scales have 16 bits, so that this equals multiplication in the
    scales' own type.
    """
    return (numbers.astype(mx.float32) * scales.astype(mx.float32)).astype(scales.dtype)
