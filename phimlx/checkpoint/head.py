"""Output heads that are stored beside the embedding to which a config ties them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import mlx.core as mx

from phimlx.checkpoint.header import STORED_DTYPES, TensorInfo, byte_range
from phimlx.errors import CheckpointError

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
PARTS = ("weight", "scales", "biases")
BLOCK_BYTES = 16 << 20  # of each that are compared at once

Tensors = Mapping[str, TensorInfo]
ReadRows = Callable[[TensorInfo, int, int], bytes]


def has_own_head(tensors: Tensors, read: ReadRows | None = None) -> bool:
    """Whether a head is stored whose values are not the embedding's.

    Both are read as far as they are equal, a block of rows at a time.

    Args:
        read: gives bytes of rows `first` to `last` (not included); from its file where None.

    Raises:
        CheckpointError: where a file ends before its tensors do.

    Source: transformers 5, `modeling_utils.py`, `tie_weights`.
    """
    head, embedding = parts_of(tensors, HEAD), parts_of(tensors, EMBEDDING)
    if "weight" not in head or "weight" not in embedding:
        return False
    return head.keys() != embedding.keys() or any(
        _differ(info, embedding[part], read or _read_rows) for part, info in head.items()
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


def _differ(one: TensorInfo, other: TensorInfo, read: ReadRows) -> bool:
    if one.shape != other.shape:
        return True
    if not one.nbytes:
        return False
    rows = one.shape[0] if one.shape else 1
    height = max(1, BLOCK_BYTES // (max(one.nbytes, other.nbytes) // rows))
    for first in range(0, rows, height):
        last = min(first + height, rows)
        block, other_block = read(one, first, last), read(other, first, last)
        if one.dtype == other.dtype and block == other_block:
            continue
        values = _numbers(block, one), _numbers(other_block, other)
        if not mx.array_equal(*values, equal_nan=True):
            return True
    return False


def _read_rows(info: TensorInfo, first: int, last: int) -> bytes:
    begin, end = byte_range(info, first, last)
    with info.file.open("rb") as file:
        data = os.pread(file.fileno(), end - begin, begin)
    if len(data) < end - begin:
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
