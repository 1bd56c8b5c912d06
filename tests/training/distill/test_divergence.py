"""Losses of distillation against torch's, which `scripts/goldens/distill_goldens.py` wrote down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phimlx.training.distill.divergence import KINDS, Divergence

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "distill.json").read_text())


def log_probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def known(logits: np.ndarray, k: int, temperature: float) -> tuple[mx.array, mx.array]:
    """The k likeliest tokens, and log-probabilities of these and of the rest."""
    logs = log_probabilities(logits, temperature)
    order = np.argsort(-logs, axis=-1)
    best, rest = order[:, :k], np.take_along_axis(logs, order[:, k:], -1)
    kept = np.take_along_axis(logs, best, -1)
    whole = np.concatenate([kept, np.log(np.exp(rest).sum(-1, keepdims=True))], -1)
    return mx.array(best), mx.array(whole.astype(np.float32))


def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(GOLDEN["seed"])
    size = (2, GOLDEN["rows"], GOLDEN["vocabulary"])
    both = random.standard_normal(size).astype(np.float32) * np.float32(GOLDEN["spread"])
    return both[0], both[1], random.integers(0, GOLDEN["vocabulary"], GOLDEN["rows"])


@pytest.mark.parametrize(
    "case",
    GOLDEN["cases"],
    ids=lambda case: f"{case['loss_type']} {case['beta']} {case['k']} {case['temperature']}",
)
def test_losses_and_gradients_are_torchs(case: dict[str, Any]) -> None:
    teacher, student, targets = drawn()
    tokens, logs = known(teacher, case["k"], case["temperature"])
    loss = Divergence(case["loss_type"], case["beta"], case["temperature"], GOLDEN["sft"])
    criterion = loss.criterion(mx.array(targets), tokens, logs)
    (total, divergence, entropy), gradient = criterion(mx.array(student), slice(None))
    for found, name in ((total, "loss"), (divergence, "divergence"), (entropy, "entropy")):
        np.testing.assert_allclose(np.array(found), case[name], rtol=1e-5)
    expected = np.array(case["gradient"])
    assert np.abs(np.array(gradient) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(kind: str) -> None:
    teacher, _, _ = drawn()
    tokens, logs = known(teacher, 5, 1.0)
    divergence, gradient = Divergence(kind).compare(mx.array(teacher), tokens, logs)
    assert mx.abs(divergence).max() < 1e-6
    assert mx.abs(gradient).max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_sure_makes_no_infinities(kind: str) -> None:
    """One logit far above all others, in a vocabulary of several blocks of sums."""
    tokens = mx.arange(300)[None]
    logs = mx.concatenate([mx.zeros((1, 1)), mx.full((1, 299), -90.0), mx.full((1, 1), -200.0)], -1)
    for student in (mx.zeros((1, 1000)), mx.where(mx.arange(1000) == 999, 300.0, 0.0)[None]):
        divergence, gradient = Divergence(kind).compare(student, tokens, logs)
        assert mx.isfinite(divergence).all()
        assert mx.isfinite(gradient).all()
        assert divergence[0] > 0
