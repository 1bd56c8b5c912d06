"""How far two models agree, against float64 over a published vocabulary."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from convert.measure.compare import _sums

VOCABULARY, TOKENS = 200_064, 17


class LogitsAsStates(nn.Module):
    """A model whose hidden states are its logits."""

    def head(self, x: mx.array) -> mx.array:
        return x


@pytest.mark.parametrize("spread", [2, 3])
def test_sums_over_a_large_vocabulary_equal_those_of_float64(spread: int) -> None:
    random = np.random.default_rng(spread)
    first = (spread * random.standard_normal((TOKENS, VOCABULARY))).astype(np.float32)
    second = first + random.standard_normal(first.shape, np.float32)
    ids = random.integers(0, VOCABULARY, TOKENS)
    model: Any = LogitsAsStates()
    found = _sums(
        [mx.array(ids)[None]],
        (model, [mx.array(first)]),
        (model, [mx.array(second)]),
        lambda part: None,
    )[0]
    rows = np.arange(TOKENS - 1)
    p, q = (
        wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
        for wide in (logits[:-1].astype(np.float64) for logits in (first, second))
    )
    expected = [
        -p[rows, ids[1:]].sum(),
        -q[rows, ids[1:]].sum(),
        (np.exp(p) * (p - q)).sum(),
        (p.argmax(axis=-1) == q.argmax(axis=-1)).sum(),
    ]
    assert found == pytest.approx(expected, rel=1e-6)
