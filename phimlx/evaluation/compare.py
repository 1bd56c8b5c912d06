"""Two models on the same rows: how they differ, how sure that is, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phimlx.api import Phi
from phimlx.evaluation.data import Answer
from phimlx.training.data.examples import Dataset

RESAMPLES = 10_000
CONFIDENCE = 0.95
AT_ONCE = 1 << 22  # numbers drawn together


@dataclass(frozen=True)
class RowResult:
    """One model's result on a row.

    Attributes:
        nats: cross-entropy of all that is to be learned in it.
        tokens, letters: how much that is, in tokens of the model and in bytes of UTF-8.
        answer: to its question, where it was asked.
    """

    nats: float
    tokens: int
    letters: int
    answer: Answer | None = None


@dataclass(frozen=True)
class Difference:
    """A measure of both models, and B's less A's with the interval that holds it."""

    measure: str
    a: float
    b: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        return self.b - self.a

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def as_object(self) -> dict[str, Any]:
        """Make an object of JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "difference": self.difference,
            "interval": [self.low, self.high],
            "clear": self.is_clear,
        }


def row_results(phi: Phi, data: Dataset, losses: Sequence[float]) -> dict[str, RowResult]:
    """Sum up the losses of examples for each row, by its place."""
    assert phi.tokenizer is not None  # rows have been encoded with it
    found: dict[str, RowResult] = {}
    for example, nats in zip(data.examples, losses, strict=True):
        learned = example.tokens[example.supervised].tolist()
        letters = len(phi.tokenizer.decode(learned).encode("utf-8", "replace"))
        place = example.source.partition(", part ")[0]
        before = found.get(place, RowResult(0.0, 0, 0))
        found[place] = RowResult(
            before.nats + nats, before.tokens + len(learned), before.letters + letters
        )
    return found


def compare(
    a: dict[str, RowResult], b: dict[str, RowResult], seed: int = 0
) -> tuple[list[Difference], list[str]]:
    """Compare two models on the rows that both have results of.

    Loss is that of a token, or, where the two do not divide the text alike, of a byte of it.

    Returns:
        The measures, and the places of the rows.
    """
    places = [place for place in a if place in b]
    one, other = ([side[place] for place in places] for side in (a, b))
    alike = [row.tokens for row in one] == [row.tokens for row in other]
    size = np.array([row.tokens if alike else row.letters for row in one], float)
    nats = [np.array([row.nats for row in side]) for side in (one, other)]
    unit = "token" if alike else "byte"
    measures = [_difference(f"loss per {unit}", nats[0], nats[1], size, seed)]
    asked = [
        (x.answer, y.answer)
        for x, y in zip(one, other, strict=True)
        if x.answer is not None and y.answer is not None
    ]
    for name, field in (("exact match", "exact"), ("token F1", "f1")):
        if asked:
            values = np.array([[float(getattr(each, field)) for each in pair] for pair in asked])
            each = np.ones(len(asked))
            measures.append(_difference(name, values[:, 0], values[:, 1], each, seed))
    return measures, places


def _difference(
    measure: str, a: np.ndarray, b: np.ndarray, size: np.ndarray, seed: int
) -> Difference:
    """Resample rows, both models' results of a row together.

    Source: paired bootstrap, Koehn, EMNLP 2004, section 3; percentile intervals, Efron &
    Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    random = np.random.Generator(np.random.PCG64([seed]))
    excess, rows = b - a, len(size)
    drawn = []
    per_turn = max(1, AT_ONCE // rows)
    for begin in range(0, RESAMPLES, per_turn):
        count = min(per_turn, RESAMPLES - begin)
        chosen = random.integers(0, rows, (count, rows))
        drawn.append(excess[chosen].sum(axis=1) / size[chosen].sum(axis=1))
    edge = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.concatenate(drawn), [edge, 100 - edge])
    total = size.sum()
    return Difference(measure, a.sum() / total, b.sum() / total, float(low), float(high))
