"""Headers of safetensors files: which tensors they hold, in what shape and type."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from phimlx.errors import CheckpointError

# Element types that a checkpoint may hold, in safetensors' names.
STORED_DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
FLOATING_DTYPES = ("F32", "F16", "BF16")
PACKED_DTYPES = {mx.uint32: ("U32",), mx.uint8: ("U8",)}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor, as its file's header describes it.

    Attributes:
        dtype: safetensors' name: BF16, F32, U32 …
        name: under which it is stored, in a dialect whose names are not the model's.
        first_row: where it begins in the stored tensor, of which it is some rows in a dialect that
            keeps several together.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    name: str
    first_row: int = 0

    @property
    def nbytes(self) -> int:
        size = STORED_DTYPES[self.dtype].size
        for dimension in self.shape:
            size *= dimension
        return size


def read_header(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Names, shapes and types of a safetensors file, through the reference parser.

    Raises:
        CheckpointError: where it is damaged, or holds a type that phimlx does not read.
    """
    for name, info in list_tensors(file):
        check_type(info)
        yield name, info


def list_tensors(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    """List what `read_header` does, whatever the types."""
    try:
        with safe_open(str(file), framework="mlx") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                tensor = opened.get_slice(name)
                yield name, TensorInfo(file, tuple(tensor.get_shape()), tensor.get_dtype(), name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file.name} is not a whole safetensors file ({error}).",
            hint="Download or convert the model again.",
        ) from error


def check_type(info: TensorInfo) -> None:
    """Raise CheckpointError for a type that phimlx does not read."""
    if info.dtype not in STORED_DTYPES:
        raise CheckpointError(
            f"{info.name} in {info.file.name} is stored as {info.dtype}, which phimlx does not "
            "read."
        )


def byte_range(info: TensorInfo, first: int, last: int) -> tuple[int, int]:
    """Find the bytes of rows `first` to `last` (not included) in a file of an accepted header.

    Source: https://github.com/huggingface/safetensors#format
    """
    with info.file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        offset: int = json.loads(opened.read(length))[info.name]["data_offsets"][0]
    row = info.nbytes // (info.shape[0] if info.shape else 1)
    begin = 8 + length + offset + (info.first_row + first) * row
    return begin, begin + (last - first) * row
