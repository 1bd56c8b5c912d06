"""The training loss: output head and criterion in one, chunk by chunk, over supervised rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phimlx.machine.order import after
from phimlx.machine.reductions import long_sum, split_logsumexp

CHUNK_ROWS = 128  # rows whose logits exist at one time

Head = Callable[[mx.array], mx.array]
Values = Sequence[mx.array]
Criterion = Callable[[mx.array, slice], tuple[Values, mx.array]]
"""Makes of logits `[rows, vocab]`, and of where these rows stand among all, values of each row,
float32 `[rows]`, and the gradient of the first, the loss, with respect to the logits."""


def token_losses(
    head: nn.Module, hidden: mx.array, targets: mx.array, rows: int = CHUNK_ROWS
) -> mx.array:
    """Cross-entropy of each row's logits, never holding `[n, vocab]` as a whole.

    The gradient with respect to `hidden` is computed in the forward pass, chunk by chunk, while the
    logits are there; the backward pass only scales it. That of a head that is trained depends on
    what becomes of each loss, so that the logits are then computed again in the backward pass;
    where only a weighted sum is wanted, `linear_cross_entropy` does without.

    Args:
        head: `nn.Linear` or `nn.Embedding` (a tied head), plain or quantized.
        hidden: `[n, hidden]`; supervised rows only, for every row costs a pass over the vocabulary.
        targets: `[n]`, the token that each row should predict.
        rows: how many rows make a chunk.

    Returns:
        float32 `[n]`.
    """
    if "weight" in head.trainable_parameters():
        return _trained_head_losses(head, hidden, targets, rows)
    return _row_values(head, hidden, cross_entropy_to(targets), rows)[0]


def _trained_head_losses(
    head: nn.Module, hidden: mx.array, targets: mx.array, rows: int
) -> mx.array:
    """Compute `token_losses` with gradients of the head's weight and bias too."""

    @mx.custom_function
    def losses(hidden: mx.array, weight: mx.array, *bias: mx.array) -> tuple[mx.array, ...]:
        found: list[mx.array] = []
        for here, x in _chunks(hidden, rows, [found]):
            found.append(cross_entropy(sum(bias, x @ weight.T), targets[here])[0])
        return (mx.concatenate(found),)

    @losses.vjp
    def _(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
        hidden, weight, *bias = primals
        gradients: list[mx.array] = []
        summed: list[mx.array] = []
        for here, x in _chunks(hidden, rows, [gradients, summed]):
            excess = cross_entropy(sum(bias, x @ weight.T), targets[here])[1]
            excess = (excess * cotangents[0][here, None]).astype(excess.dtype)
            gradients.append(excess @ weight)
            _add_head_gradients(summed, x, excess, len(bias))
        return [mx.concatenate(gradients), *summed]

    bias = (head.bias,) if "bias" in head else ()
    return cast(Sequence[mx.array], losses(hidden, head.weight, *bias))[0]


def _add_head_gradients(summed: list[mx.array], x: mx.array, excess: mx.array, biases: int) -> None:
    """Add a chunk's gradients of a head's weight and biases to arrays that grow by addition."""
    parts = [excess.T @ x, *(excess.sum(axis=0) for _ in range(biases))]
    summed[:] = [a + b for a, b in zip(parts, summed, strict=True)] if summed else parts


def measured_losses(
    head: nn.Module, hidden: mx.array, targets: mx.array, rows: int = CHUNK_ROWS
) -> mx.array:
    """Compute what `token_losses` does for half the work, where no gradient will be asked for."""
    return measured_values(head, hidden, cross_entropy_to(targets), rows)[0]


def linear_cross_entropy(
    head: nn.Module, hidden: mx.array, targets: mx.array, weights: mx.array, rows: int = CHUNK_ROWS
) -> mx.array:
    """Sum up weights · cross-entropy, whose gradients reach `hidden` and a head that is trained.

    Args:
        weights: float32 `[n]`; 0 for rows of padding. The rest as `token_losses`.

    Returns:
        The sum, float32 scalar.
    """
    return linear_loss(head, hidden, cross_entropy_to(targets), weights, rows)[0]


def cross_entropy_to(targets: mx.array) -> Criterion:
    """Make the criterion of cross-entropy with the token `[n]` that each row should predict."""

    def criterion(logits: mx.array, here: slice) -> tuple[Values, mx.array]:
        loss, excess = cross_entropy(logits, targets[here])
        return (loss,), excess

    return criterion


def measured_values(
    head: nn.Module, hidden: mx.array, criterion: Criterion, rows: int = CHUNK_ROWS
) -> Values:
    """A criterion's values of all rows, float32 `[n]` each, where no gradient is asked for."""
    found: list[Values] = []
    for here, x in _chunks(hidden, rows, [found]):
        found.append(criterion(_projection(head)(x), here)[0])
    return [mx.concatenate(list(values)) for values in zip(*found, strict=True)]


def linear_loss(
    head: nn.Module,
    hidden: mx.array,
    criterion: Criterion,
    weights: mx.array,
    rows: int = CHUNK_ROWS,
) -> Values:
    """Sum up weights · each value of a criterion of the logits that a head makes.

    The gradients of the first sum reach `hidden` and a head that is trained; arguments as
    `linear_cross_entropy`.

    Returns:
        The sums, float32 scalars.
    """
    if "weight" not in head.trainable_parameters():
        found = _row_values(head, hidden, criterion, rows)
        return [long_sum(values * weights) for values in found]

    sums = 0  # how many there are, which the first call tells

    @mx.custom_function
    def losses(hidden: mx.array, weight: mx.array, *bias: mx.array) -> tuple[mx.array, ...]:
        nonlocal sums
        found: list[Values] = []
        gradients: list[mx.array] = []
        summed: list[mx.array] = []
        for here, x in _chunks(hidden, rows, [found, gradients, summed]):
            values, excess = criterion(sum(bias, x @ weight.T), here)
            excess = (excess * weights[here, None]).astype(excess.dtype)
            found.append(values)
            gradients.append(excess @ weight)
            _add_head_gradients(summed, x, excess, len(bias))
        totals = [
            long_sum(mx.concatenate(list(each)) * weights) for each in zip(*found, strict=True)
        ]
        sums = len(totals)
        return *totals, mx.concatenate(gradients), *summed

    @losses.vjp
    def _(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
        return [
            (cotangents[0] * gradient).astype(primal.dtype)
            for gradient, primal in zip(outputs[sums:], primals, strict=True)
        ]

    bias = (head.bias,) if "bias" in head else ()
    outputs = cast(Sequence[mx.array], losses(hidden, head.weight, *bias))
    return outputs[:sums]


def _row_values(head: nn.Module, hidden: mx.array, criterion: Criterion, rows: int) -> Values:
    """A criterion's values of all rows; the gradient of the first reaches `hidden` alone.

    It is computed in the forward pass, chunk by chunk, while the logits are there; the backward
    pass only scales it.

    Source: the gradient of a loss over a linear layer, ∂L/∂logits · W; chunked as in Liger Kernel
    (arXiv 2410.10989), section 3.2.
    """
    project = _projection(head)

    @mx.custom_function
    def losses(hidden: mx.array) -> tuple[mx.array, ...]:
        found: list[Values] = []
        gradients: list[mx.array] = []
        for here, x in _chunks(hidden, rows, [found, gradients]):
            values, excess = criterion(project(x), here)
            found.append(values)
            gradients.append(mx.vjp(project, [x], [excess])[1][0])
        values = [mx.concatenate(list(each)) for each in zip(*found, strict=True)]
        return *values, mx.concatenate(gradients)

    @losses.vjp
    def _(primal, cotangents, outputs):  # type: ignore[no-untyped-def]
        return (cotangents[0][:, None] * outputs[-1]).astype(primal.dtype)

    return cast(Sequence[mx.array], losses(hidden))[:-1]


def _projection(head: nn.Module) -> Head:
    """The map from hidden states to logits: a tied embedding's, or the head itself."""
    return head.as_linear if hasattr(head, "as_linear") else head


def _chunks(
    hidden: mx.array, rows: int, results: Sequence[list[Any]]
) -> Iterator[tuple[slice, mx.array]]:
    """The rows a chunk at a time, each waiting for the last results of the one before it.

    Without that order all chunks may be computed at once, and all logits be there together.
    """
    for start in range(0, hidden.shape[0], rows):
        here = slice(start, start + rows)
        last = [result[-1] for result in results if result]
        arrays: dict[str, mx.array] = dict(tree_flatten(last))
        yield here, after(hidden[here], *arrays.values())


def cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Each row's loss, and softmax(logits) − onehot(targets), its gradient, in the logits' type."""
    wide = logits.astype(mx.float32)  # [rows, vocab]
    largest, log_total = split_logsumexp(wide)
    target = mx.take_along_axis(wide, targets[:, None], axis=-1)
    loss = (log_total - (target - largest)).squeeze(-1)
    likelihoods = mx.exp((wide - largest) - log_total)
    excess = likelihoods.at[mx.arange(targets.size), targets].add(-1)
    return loss, excess.astype(logits.dtype)
