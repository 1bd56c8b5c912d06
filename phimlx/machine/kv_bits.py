"""The quantized form of keys and values: how many bits, in what groups, and what it takes."""

from __future__ import annotations

from phimlx.errors import GenerationError

KV_BITS = (8, 4)
GROUPS = (64, 32)  # values that share a scale and a bias, the better first; MLX has no smaller ones


def kv_group_size(head_dim: int) -> int | None:
    """Return the size of the groups that divide a head: 64 where they can, else 32, else None.

    Groups lie within one token's key or value of one head, so what a token is quantized to does
    not depend on any other. Phi-3-mini's heads of 96 have groups of 32.
    """
    return next((size for size in GROUPS if head_dim % size == 0), None)


def check_kv_bits(kv_bits: int | None, head_dim: int) -> None:
    """Check that keys and values of such heads can be held in so many bits; None is not at all.

    Raises:
        GenerationError: for other bits, or heads that no groups divide.
    """
    if kv_bits is None:
        return
    if isinstance(kv_bits, bool) or kv_bits not in KV_BITS:
        raise GenerationError(f"kv_bits is {kv_bits!r}; it must be 8 or 4, or None for neither.")
    if kv_group_size(head_dim) is None:
        raise GenerationError(
            f"This model's heads have {head_dim} channels, which groups of 32 do not divide, so "
            "its keys and values cannot be quantized.",
            hint="Leave kv_bits (--kv-bits) out.",
        )


def kv_bytes_per_value(head_dim: int, itemsize: int, kv_bits: int | None = None) -> float:
    """Count the bytes of one number of a key or value, its share of scale and bias included.

    Args:
        itemsize: bytes of one number in the computation, and of a scale or bias.
        kv_bits: what they are quantized to; not at all where None, or where no groups divide heads.
    """
    group = kv_group_size(head_dim)
    if kv_bits is None or group is None:
        return itemsize
    return kv_bits / 8 + 2 * itemsize / group
