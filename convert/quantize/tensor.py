"""A block of a layer's rows -> the tensors that stand for it in the output."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from convert.quantize.recipe import Quantization
from phimlx.errors import ConversionError

Item = TypeVar("Item")
MAX_STREAMS = 4

# Integer types of the same size, and the bits of infinity.
INFINITIES = {
    mx.float32: (mx.int32, mx.uint32, 0x7F800000),
    mx.float16: (mx.int16, mx.uint16, 0x7C00),
    mx.bfloat16: (mx.int16, mx.uint16, 0x7F80),
}


@dataclass(frozen=True)
class TensorTransform:
    """A change of a tensor, or of a layer's tensors, from one form to another.

    Rows stand for themselves in every form, so that a block of them can be changed alone.

    Attributes:
        name: of the tensor; for a layer that is or becomes quantized that of its `.weight`.
        source: how it is stored; None where it is not quantized.
        target: how it is to be stored; None where it is not to be quantized.
        dtype: of unquantized weights, scales and biases in the output.
    """

    name: str
    source: Quantization | None
    target: Quantization | None
    dtype: mx.Dtype

    def apply(self, stored: Sequence[mx.array], first: int = 0) -> TransformedRows:
        """Make the new form of a block; nothing is computed before it is evaluated.

        Args:
            stored: `[rows, ...]`, or where `source` is not None the packed `[rows, width * bits /
                32]`, scales and biases (which only affine mode has) `[rows, width / group_size]`.
            first: number of the first of these rows in the tensor.
        """
        if self.source is None:
            plain = stored[0]
        else:
            float_dtype = None if stored[1].dtype in INFINITIES else self.dtype
            packed, scales, *biases = stored
            plain = mx.dequantize(
                packed,
                scales,
                biases[0] if biases else None,
                dtype=float_dtype,
                **asdict(self.source),
            )
        source_finite = is_finite(plain)
        cast = plain.astype(self.dtype)
        same = self.source == self.target and all(
            array.dtype in (self.dtype, mx.uint8, mx.uint32) for array in stored
        )
        parts: tuple[mx.array, ...] = (cast,)
        if self.target is not None and same:
            parts = tuple(stored)
        elif self.target is not None:
            parts = tuple(mx.quantize(cast, **asdict(self.target)))
        result_finite = source_finite if cast.dtype == plain.dtype else is_finite(cast)
        for part in parts[1:]:
            if part.dtype in INFINITIES:  # a scale can be larger than every weight in its group
                result_finite = result_finite & is_finite(part)
        return TransformedRows(
            self, dict(zip(self.names, parts, strict=False)), source_finite, result_finite
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors in the output; the last only in affine mode."""
        if self.target is None:
            return (self.name,)
        path = self.name.removesuffix(".weight")
        return (f"{path}.weight", f"{path}.scales", f"{path}.biases")


@dataclass(frozen=True)
class TransformedRows:
    """Rows in their new form, with what must hold for them to be right.

    Attributes:
        parts: their tensors, by name.
        source_finite, result_finite: whether no number is NaN or infinite, before and after.
    """

    transform: TensorTransform
    parts: dict[str, mx.array]
    source_finite: mx.array
    result_finite: mx.array

    def with_parts(self, first: int, last: int, tensors: Mapping[str, mx.array]) -> TransformedRows:
        """Take rows `first` to `last` (not included) of these tensors where they are named.

        Args:
            tensors: whole, in the form of the output.
        """
        parts, result_finite = dict(self.parts), self.result_finite
        for name in parts.keys() & tensors.keys():
            parts[name] = tensors[name][first:last]
            if parts[name].dtype in INFINITIES:
                result_finite = result_finite & is_finite(parts[name])
        return replace(self, parts=parts, result_finite=result_finite)

    def check(self) -> None:
        """Raise `ConversionError` where a number is NaN or infinite, before or after."""
        if not self.source_finite.item():
            raise ConversionError(
                f"{self.transform.name} holds NaN or infinity: this model is damaged.",
                hint="Download it again.",
            )
        if not self.result_finite.item():
            raise ConversionError(
                f"{self.transform.name} holds numbers too large for "
                f"{dtype_name(self.transform.dtype)}.",
                hint="Choose bfloat16 or float32.",
            )


def is_finite(array: mx.array) -> mx.array:
    """Tell whether no exponent is all ones, as one boolean.

    Read as integers, positive numbers stand in their own order and negative ones in reverse, so
    that the largest signed and the largest unsigned integer tell; this takes no memory, and a
    tenth of the time of `mx.isfinite`.
    """
    signed, unsigned, infinity = INFINITIES[array.dtype]
    negative_infinity = infinity | 1 << 8 * array.dtype.size - 1
    below = array.view(signed).max() < mx.array(infinity, signed)
    above = array.view(unsigned).max() < mx.array(negative_infinity, unsigned)
    return below & above


def check_finite(prefix: str, module: nn.Module) -> None:
    """Raise `ConversionError` where a weight is NaN or infinite, which calibration would spread."""
    for name, array in dict(tree_flatten(module.parameters())).items():
        if not is_finite(array).item():
            raise ConversionError(
                f"{prefix}{name} holds NaN or infinity: this model is damaged.",
                hint="Download it again.",
            )


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


_ready = threading.local()


def parallel_streams() -> list[mx.Stream]:
    """Streams on which blocks can be computed at once: one for each core, one for a GPU.

    They are made once for each thread, since MLX keeps a stream to the end of the process.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return [mx.default_stream(mx.default_device())]
    if not hasattr(_ready, "streams"):
        count = min(os.cpu_count() or 1, MAX_STREAMS)
        _ready.streams = [mx.new_stream(mx.Device(mx.cpu)) for _ in range(count)]
    streams: list[mx.Stream] = _ready.streams
    return streams


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last shorter (`itertools.batched` comes with Python 3.12)."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
