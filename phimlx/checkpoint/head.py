"""Output heads that are stored beside the embedding to which a config ties them."""

from __future__ import annotations

import os
from collections.abc import Mapping

import mlx.core as mx

from phimlx.checkpoint.header import STORED_DTYPES, TensorInfo, data_offset
from phimlx.errors import CheckpointError

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
PARTS = ("weight", "scales", "biases")
BLOCK_BYTES = 16 << 20  # of each that are compared at once

Tensors = Mapping[str, TensorInfo]


def has_own_head(tensors: Tensors) -> bool:
    """Whether a head is stored whose values are not the embedding's.

    Both are read as far as they are equal, a block of rows at a time.

    Raises:
        CheckpointError: where a file ends before its tensors do.

    Source: transformers 5, `modeling_utils.py`, `tie_weights`.
    """
    head, embedding = parts_of(tensors, HEAD), parts_of(tensors, EMBEDDING)
    if "weight" not in head or "weight" not in embedding:
        return False
    return head.keys() != embedding.keys() or any(
        _differ(info, embedding[part]) for part, info in head.items()
    )


def with_embedding(tensors: Tensors) -> dict[str, TensorInfo]:
    """Call the tensor that head and embedding share the embedding where it is stored as the head.

    Which of the two names a shared tensor keeps is up to the tool that saves it.
    """
    if parts_of(tensors, EMBEDDING):
        return dict(tensors)
    names = {f"{HEAD}.{part}": f"{EMBEDDING}.{part}" for part in parts_of(tensors, HEAD)}
    return {names.get(name, name): info for name, info in tensors.items()}


def parts_of(tensors: Tensors, path: str) -> dict[str, TensorInfo]:
    """Select weight, scales and biases of a layer, those that are stored."""
    names = {part: f"{path}.{part}" for part in PARTS}
    return {part: tensors[name] for part, name in names.items() if name in tensors}


def _differ(one: TensorInfo, other: TensorInfo) -> bool:
    if one.shape != other.shape:
        return True
    if not one.nbytes:
        return False
    rows = one.shape[0] if one.shape else 1
    height = max(1, BLOCK_BYTES // (max(one.nbytes, other.nbytes) // rows))
    with one.file.open("rb") as file, other.file.open("rb") as other_file:
        for first in range(0, rows, height):
            last = min(first + height, rows)
            block = _read_rows(file.fileno(), one, first, last)
            other_block = _read_rows(other_file.fileno(), other, first, last)
            if one.dtype == other.dtype and block == other_block:
                continue
            values = _numbers(block, one), _numbers(other_block, other)
            if not mx.array_equal(*values, equal_nan=True):
                return True
    return False


def _read_rows(descriptor: int, info: TensorInfo, first: int, last: int) -> bytes:
    size = info.nbytes // (info.shape[0] if info.shape else 1)
    begin = data_offset(info) + (info.first_row + first) * size
    data = os.pread(descriptor, (last - first) * size, begin)
    if len(data) < (last - first) * size:
        raise CheckpointError(
            f"{info.file.name} ends within {info.name}: it was changed while it was read.",
            hint="Download or convert the model again.",
        )
    return data


def _numbers(data: bytes, info: TensorInfo) -> mx.array:
    words = mx.array(memoryview(data))  # type: ignore[arg-type]
    numbers = words.view(STORED_DTYPES[info.dtype])
    # float32 holds every number of the other types; packed ones are compared as they are
    return numbers.astype(mx.float32) if mx.issubdtype(numbers.dtype, mx.floating) else numbers
