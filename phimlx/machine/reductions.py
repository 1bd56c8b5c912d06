"""Sums over long axes, taken in blocks so that float32 keeps its digits.

MLX's CPU backend adds a whole axis into a handful of float32 accumulators: over a vocabulary of
200,064 the last additions lose most of their digits, and over the 100 million numbers of a gradient
nearly a fifth of the sum. A sum of sums of `BLOCK` numbers loses about as little as pairwise
summation (Higham, "The accuracy of floating point summation", 1993) for one more pass over
1 / `BLOCK` of the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

BLOCK = 128  # numbers that are added one after the other


def long_sum(x: mx.array) -> mx.array:
    """Sum over the last axis, `[..., n]` to `[...]`, in the array's own type."""
    length = x.shape[-1]
    if length <= BLOCK:
        return x.sum(axis=-1)
    whole = length - length % BLOCK
    sums = x[..., :whole].reshape(*x.shape[:-1], -1, BLOCK).sum(axis=-1)  # [..., blocks]
    if whole < length:
        sums = mx.concatenate([sums, x[..., whole:].sum(axis=-1, keepdims=True)], axis=-1)
    return long_sum(sums)


def log_softmax(logits: mx.array) -> mx.array:
    """Logarithms of the softmax over the last axis, in float32."""
    shifted = logits.astype(mx.float32)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    return shifted - mx.log(long_sum(mx.exp(shifted)))[..., None]


def sum_of_squares(x: mx.array) -> mx.array:
    """Sum of the squares of all numbers; float32 scalar."""
    return long_sum(x.astype(mx.float32).square().reshape(-1))


def euclidean_norm(arrays: Iterable[mx.array]) -> mx.array:
    """Euclidean norm of all numbers of all arrays together; float32 scalar."""
    return mx.sqrt(long_sum(mx.stack([sum_of_squares(array) for array in arrays])))
