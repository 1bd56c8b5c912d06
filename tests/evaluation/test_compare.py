"""Intervals of paired differences against the normal distribution, where it gives them too."""

from __future__ import annotations

import math

import numpy as np
import pytest

from phimlx.evaluation.compare import RowResult, compare
from phimlx.evaluation.data import Answer

ROWS = 400


def answered(right: bool) -> Answer:
    return Answer("", "", "", right, float(right), right, True)


def test_the_interval_is_that_of_paired_rows() -> None:
    """Rows vary far more than the two differ, which only pairing sees."""
    random = np.random.default_rng(3)
    hard = random.uniform(0, 50, ROWS)
    gain = random.normal(-0.5, 1, ROWS)
    a = {f"r{i}": RowResult(hard[i], 10, 30) for i in range(ROWS)}
    b = {f"r{i}": RowResult(hard[i] + gain[i], 10, 30) for i in range(ROWS)}
    (loss,), places = compare(a, b)
    assert len(places) == ROWS
    assert loss.measure == "loss per token"
    assert loss.difference == pytest.approx(gain.mean() / 10, rel=1e-9)
    half = 1.96 * gain.std() / math.sqrt(ROWS) / 10
    assert loss.low == pytest.approx(loss.difference - half, abs=0.1 * half)
    assert loss.high == pytest.approx(loss.difference + half, abs=0.1 * half)
    assert loss.is_clear


def test_a_share_has_the_interval_of_what_flipped() -> None:
    """Of 400 rows 30 became right and 20 wrong: a difference of 0.025 ± 1.96 √(50 - 0.25) / 400."""
    a = {f"r{i}": RowResult(1, 1, 1, answered(i >= 30)) for i in range(ROWS)}
    b = {f"r{i}": RowResult(1, 1, 1, answered(i < 30 or i >= 50)) for i in range(ROWS)}
    _, exact, f1 = compare(a, b)[0]
    assert exact.difference == pytest.approx(0.025)
    half = 1.96 * math.sqrt(50 - 0.25) / ROWS
    assert exact.high - exact.low == pytest.approx(2 * half, rel=0.05)
    assert not exact.is_clear
    assert (f1.low, f1.high) == (exact.low, exact.high)


def test_models_that_divide_text_otherwise_are_compared_by_bytes() -> None:
    a = {"r": RowResult(6.0, 3, 12), "only a": RowResult(1, 1, 1)}
    b = {"r": RowResult(9.0, 2, 12)}
    (loss,), places = compare(a, b)
    assert (loss.measure, loss.a, loss.b) == ("loss per byte", 0.5, 0.75)
    assert places == ["r"]
