"""Output heads that are stored beside the embedding to which a config ties them."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from phimlx.checkpoint.tensors import FLOATING_DTYPES, StoredRows, Tensor, Tensors

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
PARTS = ("weight", "scales", "biases")
BLOCK_BYTES = 16 << 20  # of each that are compared at once

Read = Callable[[StoredRows], bytes]


def has_own_head(tensors: Tensors, read: Read | None = None) -> bool:
    """Whether a head is stored whose values are not the embedding's.

    Both are read as far as they are equal, a block of rows at a time.

    Args:
        read: gives the bytes of stored rows; from their files where None.

    Raises:
        CheckpointError: where a file ends before its tensors do.

    Source: transformers 5, `modeling_utils.py`, `tie_weights`.
    """
    head, embedding = parts_of(tensors, HEAD), parts_of(tensors, EMBEDDING)
    if "weight" not in head or "weight" not in embedding:
        return False
    return head.keys() != embedding.keys() or any(
        _differ(tensor, embedding[part], read or StoredRows.read) for part, tensor in head.items()
    )


def with_embedding(tensors: Tensors) -> dict[str, Tensor]:
    """Call the tensor that head and embedding share the embedding where it is stored as the head.

    Which of the two names a shared tensor keeps is up to the tool that saves it.
    """
    if parts_of(tensors, EMBEDDING):
        return dict(tensors)
    names = {f"{HEAD}.{part}": f"{EMBEDDING}.{part}" for part in parts_of(tensors, HEAD)}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def parts_of(tensors: Tensors, path: str) -> dict[str, Tensor]:
    """Select weight, scales and biases of a layer, those that are stored."""
    names = {part: f"{path}.{part}" for part in PARTS}
    return {part: tensors[name] for part, name in names.items() if name in tensors}


def _differ(one: Tensor, other: Tensor, read: Read) -> bool:
    both_floating = one.dtype in FLOATING_DTYPES and other.dtype in FLOATING_DTYPES
    if one.shape != other.shape or (one.dtype != other.dtype and not both_floating):
        return True
    if not one.nbytes:
        return False
    count = one.count
    height = max(1, BLOCK_BYTES // (max(one.nbytes, other.nbytes) // count))
    for first in range(0, count, height):
        last = min(first + height, count)
        values, other_values = _rows(one, first, last, read), _rows(other, first, last, read)
        if one.dtype != other.dtype:  # float32 holds every number of the other types
            values, other_values = values.astype(mx.float32), other_values.astype(mx.float32)
        if not mx.array_equal(values, other_values, equal_nan=True):
            return True
    return False


def _rows(tensor: Tensor, first: int, last: int, read: Read) -> mx.array:
    parts = [stored.array(read(stored)) for stored in tensor.reads(first, last)]
    return tensor.rows(first, last, parts)
