"""Headers of safetensors files: which tensors they hold, in what shape and type."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from phimlx.checkpoint.tensors import STORED_DTYPES, TensorInfo
from phimlx.errors import CheckpointError, clipped
from phimlx.files import is_file


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
        if os.path.exists(file) and not is_file(file):  # opening a pipe would wait for ever
            raise OSError("it is not a regular file")
        with safe_open(str(file), framework="mlx") as opened:
            offsets = _offsets(file)
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                tensor = opened.get_slice(name)
                shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                yield name, TensorInfo(file, shape, dtype, name, offsets[name])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file.name} is not a whole safetensors file ({clipped(str(error))}).",
            hint="Download or convert the model again.",
        ) from error


def check_type(info: TensorInfo) -> None:
    """Raise CheckpointError for a type that phimlx does not read."""
    if info.dtype not in STORED_DTYPES:
        raise CheckpointError(
            f"{info.name} in {info.file.name} is stored as {info.dtype}, which phimlx does not "
            "read."
        )


def _offsets(file: Path) -> dict[str, int]:
    """Find where the bytes of each tensor begin, in a file whose header has been accepted.

    Source: https://github.com/huggingface/safetensors#format
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        table = json.loads(opened.read(length))
    return {
        name: 8 + length + entry["data_offsets"][0]
        for name, entry in table.items()
        if name != "__metadata__"
    }
