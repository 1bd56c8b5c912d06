"""The fused loss against MLX's own cross-entropy over all logits, and against float64.

The bounds of the latter are made by `scripts/goldens/loss_goldens.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from phimlx.training.loss import linear_cross_entropy, measured_losses, token_losses

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "loss.json").read_text())

VOCABULARY, HIDDEN, ROWS = 1000, 128, 300

HEADS: dict[str, Any] = {
    "untied": lambda: nn.Linear(HIDDEN, VOCABULARY, bias=False),
    "tied": lambda: nn.Embedding(VOCABULARY, HIDDEN),
    "untied at 4 bits": lambda: nn.Linear(HIDDEN, VOCABULARY, bias=False).to_quantized(64, 4),
    "tied at 8 bits": lambda: nn.Embedding(VOCABULARY, HIDDEN).to_quantized(64, 8),
    "tied, mxfp4": lambda: nn.Embedding(VOCABULARY, HIDDEN).to_quantized(32, 4, mode="mxfp4"),
}


def logits(head: nn.Module, hidden: mx.array) -> mx.array:
    return head.as_linear(hidden) if hasattr(head, "as_linear") else head(hidden)


def inputs(rows: int = ROWS) -> tuple[mx.array, mx.array, mx.array]:
    mx.random.seed(1)
    hidden = 3 * mx.random.normal((rows, HIDDEN))
    targets = mx.random.randint(0, VOCABULARY, (rows,))
    weights = (mx.random.uniform(shape=(rows,)) > 0.4).astype(mx.float32)
    return hidden, targets, weights


def close(found: mx.array, expected: mx.array, tolerance: float = 1e-5) -> bool:
    return bool(mx.abs(found - expected).max() <= tolerance * mx.abs(expected).max())


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("rows", [ROWS, 128, 7])
def test_loss_and_gradient_equal_the_plain_ones(kind: str, rows: int) -> None:
    head = HEADS[kind]()
    head.freeze()
    hidden, targets, weights = inputs(rows)

    def plain(x: mx.array) -> mx.array:
        return (nn.losses.cross_entropy(logits(head, x), targets) * weights).sum()

    def fused(x: mx.array) -> mx.array:
        return linear_cross_entropy(head, x, targets, weights)

    expected, expected_gradient = mx.value_and_grad(plain)(hidden)
    found, gradient = mx.value_and_grad(fused)(hidden)
    assert close(found, expected)
    assert close(gradient, expected_gradient)


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_a_trained_head_gets_its_gradient(kind: str) -> None:
    head = HEADS[kind]()
    hidden, targets, weights = inputs()

    def plain(x: mx.array) -> mx.array:
        return 0.5 * (nn.losses.cross_entropy(logits(head, x), targets) * weights).sum()

    def fused(x: mx.array) -> mx.array:
        return 0.5 * linear_cross_entropy(head, x, targets, weights)

    def gradients(loss: Any) -> tuple[mx.array, mx.array]:
        def of(parameters: Any, x: mx.array) -> mx.array:
            head.update(parameters)
            return loss(x)

        parameters = head.trainable_parameters()
        _, (of_head, of_hidden) = mx.value_and_grad(of, argnums=(0, 1))(parameters, hidden)
        head.update(parameters)
        return of_head["weight"], of_hidden

    for found, expected in zip(gradients(fused), gradients(plain), strict=True):
        assert close(found, expected)


def test_each_row_has_its_own_cotangent() -> None:
    """A loss that is no plain sum, such as a preference's, flows back row by row."""
    head = HEADS["tied"]()
    head.freeze()
    hidden, targets, _ = inputs(150)

    def plain(x: mx.array) -> mx.array:
        losses = nn.losses.cross_entropy(logits(head, x), targets)
        return nn.log_sigmoid(losses[:75].sum() / 100 - losses[75:].sum() / 100)

    def fused(x: mx.array) -> mx.array:
        losses = token_losses(head, x, targets)
        return nn.log_sigmoid(losses[:75].sum() / 100 - losses[75:].sum() / 100)

    expected, expected_gradient = mx.value_and_grad(plain)(hidden)
    found, gradient = mx.value_and_grad(fused)(hidden)
    assert close(found, expected)
    assert close(gradient, expected_gradient)


@pytest.mark.parametrize("kind", HEADS)
def test_measuring_finds_the_losses_without_a_gradient(kind: str) -> None:
    head = HEADS[kind]()
    hidden, targets, _ = inputs()
    expected = nn.losses.cross_entropy(logits(head, hidden), targets)
    assert close(measured_losses(head, hidden, targets), expected)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows() -> None:
    head = nn.Embedding(50_000, 16)
    head.freeze()
    hidden = mx.random.normal((1024, 16))
    targets = mx.random.randint(0, 50_000, (1024,))
    mx.eval(head.parameters(), hidden, targets)

    def plain(x: mx.array) -> mx.array:
        return nn.losses.cross_entropy(head.as_linear(x), targets).sum()

    def fused(x: mx.array) -> mx.array:
        return linear_cross_entropy(head, x, targets, mx.ones(1024), rows=32)

    def peak(loss: Any) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.value_and_grad(loss)(hidden))
        return mx.get_peak_memory() - before

    # MLX lets some ten operations of the CPU run ahead of each other, so not a chunk but several.
    assert peak(fused) < peak(plain) / 4


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_stays_near_float32(dtype: mx.Dtype) -> None:
    head = HEADS["tied"]()
    head.freeze()
    hidden, targets, weights = inputs()
    expected = linear_cross_entropy(head, hidden, targets, weights)
    head.set_dtype(dtype)
    found = linear_cross_entropy(head, hidden.astype(dtype), targets, weights)
    assert found.dtype == mx.float32
    assert close(found, expected, 1e-2)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['spread']}-{c['target']}")
def test_a_large_vocabulary_loses_no_more_digits_than_torch(case: dict[str, Any]) -> None:
    """Against float64, with the errors of torch's float32 as the bounds."""
    rows, vocabulary = GOLDEN["rows"], 200_064
    random = np.random.default_rng([GOLDEN["seed"], case["spread"], case["target"]])
    values = (case["spread"] * random.standard_normal((rows, vocabulary))).astype(np.float32)
    targets = random.integers(0, vocabulary, rows)
    values[np.arange(rows), targets] = case["target"]
    wide = values.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    totals = np.exp(shifted).sum(axis=-1, keepdims=True)
    expected = np.log(totals[:, 0]) - shifted[np.arange(rows), targets]
    of_logits = np.exp(shifted) / totals
    of_logits[np.arange(rows), targets] -= 1

    # Rows of an identity matrix: the head's weight holds the logits, and its gradient theirs.
    head = nn.Linear(rows, vocabulary, bias=False)
    head.weight = mx.array(values.T)
    hidden, answers = mx.eye(rows), mx.array(targets)

    def loss(weight: mx.array, x: mx.array) -> mx.array:
        head.weight = weight
        return linear_cross_entropy(head, x, answers, mx.ones(rows))

    weight = head.weight
    total, (of_weight, of_hidden) = mx.value_and_grad(loss, argnums=(0, 1))(weight, hidden)
    head.weight = weight
    measured = np.array(measured_losses(head, hidden, answers))
    head.freeze()
    frozen = mx.grad(lambda x: token_losses(head, x, answers).sum())(hidden)

    def error(found: mx.array, exact: np.ndarray) -> float:
        return float(np.linalg.norm(np.array(found) - exact) / np.linalg.norm(exact))

    assert np.abs(measured / expected - 1).max() <= case["loss"]
    assert abs(total.item() / expected.sum() - 1) <= case["loss"]
    assert error(of_weight, of_logits.T) <= case["logits"]
    assert error(of_hidden, of_logits @ wide.T) <= case["hidden"]
    assert error(frozen, of_logits @ wide.T) <= case["hidden"]
