"""Long sums against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from phimlx.machine.reductions import BLOCK, euclidean_norm, log_softmax, long_sum, sum_of_squares

LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, BLOCK**2 + BLOCK + 7, 200_064]


@pytest.mark.parametrize("length", LENGTHS)
def test_sums_and_their_gradients(length: int) -> None:
    values = np.random.default_rng(length).random((3, 2, length), np.float32)
    x = mx.array(values)
    found = np.array(long_sum(x))
    assert found.shape == (3, 2)
    assert np.allclose(found, values.sum(axis=-1, dtype=np.float64), rtol=5e-7, atol=0)
    assert np.allclose(sum_of_squares(x), np.square(values, dtype=np.float64).sum(), rtol=5e-7)
    gradient = mx.grad(lambda x: (long_sum(x) * mx.arange(6).reshape(3, 2)).sum())(x)
    assert mx.array_equal(gradient, mx.broadcast_to(mx.arange(6).reshape(3, 2, 1), x.shape))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_a_softmax_of_a_large_vocabulary_sums_to_one(dtype: mx.Dtype) -> None:
    values = mx.array(3 * np.random.default_rng(0).standard_normal((4, 200_064))).astype(dtype)
    found = log_softmax(values)
    assert found.dtype == mx.float32
    wide = np.array(values).astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    assert np.abs(np.array(found) - expected).max() < 3e-6
    assert np.abs(np.exp(np.array(found).astype(np.float64)).sum(axis=-1) - 1).max() < 1e-6


def test_the_norm_of_arrays_is_that_of_all_their_numbers() -> None:
    arrays = [mx.array(3.0), mx.full((2, 3), 2.0), mx.array([[4.0, -6.0]], mx.bfloat16)]
    assert euclidean_norm(arrays).item() == pytest.approx((9 + 24 + 16 + 36) ** 0.5, rel=1e-7)
