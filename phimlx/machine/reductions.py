"""Sums over long axes, taken in blocks so that float32 keeps its digits.

MLX's CPU backend adds a whole axis into a handful of float32 accumulators: over a vocabulary of
200,064 the last additions lose most of their digits, and over the 100 million numbers of a gradient
nearly a fifth of the sum. A sum of sums of `BLOCK` numbers loses about as little as pairwise
summation (Higham, "The accuracy of floating point summation", 1993) for one more pass over
1 / `BLOCK` of the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import mlx.core as mx

BLOCK = 128  # numbers that are added one after the other


def long_sum(x: mx.array) -> mx.array:
    """Sum over the last axis, `[..., n]` to `[...]`, in the array's own type."""
    while x.shape[-1] > BLOCK:
        x = _by_block(x, lambda part: part.sum(axis=-1))
    return x.sum(axis=-1)


def split_logsumexp(logits: mx.array) -> tuple[mx.array, mx.array]:
    """Logarithm of the sum of exponentials over the last axis, as two terms.

    Added up they would lose digits: where one logit is far above the others, the second term is
    small beside the first.

    Args:
        logits: float32 `[..., n]`.

    Returns:
        The largest logit, and log Σ exp(logits − largest); each `[..., 1]`.
    """
    largest = logits.max(axis=-1, keepdims=True)
    # Of blocks, it is computed without an array of all exponentials.
    sums = _by_block(logits, lambda part: mx.logsumexp(part, axis=-1))  # [..., blocks]
    return largest, mx.log(long_sum(mx.exp(sums - largest)))[..., None]


def log_softmax(logits: mx.array) -> mx.array:
    """Logarithms of the softmax over the last axis, in float32."""
    logits = logits.astype(mx.float32)
    largest, log_total = split_logsumexp(logits)
    return (logits - largest) - log_total


def sum_of_squares(x: mx.array) -> mx.array:
    """Sum of the squares of all numbers; float32 scalar."""
    return long_sum(x.astype(mx.float32).square().reshape(-1))


def euclidean_norm(arrays: Iterable[mx.array]) -> mx.array:
    """Euclidean norm of all numbers of all arrays together; float32 scalar."""
    return mx.sqrt(long_sum(mx.stack([sum_of_squares(array) for array in arrays])))


def _by_block(x: mx.array, reduce: Callable[[mx.array], mx.array]) -> mx.array:
    """Reduce each block of the last axis to one number, `[..., n]` to `[..., ⌈n / BLOCK⌉]`."""
    length = x.shape[-1]
    whole = length - length % BLOCK
    parts = []
    if whole:
        parts.append(reduce(x[..., :whole].reshape(*x.shape[:-1], -1, BLOCK)))
    if whole < length:
        parts.append(reduce(x[..., whole:])[..., None])
    return mx.concatenate(parts, axis=-1)
