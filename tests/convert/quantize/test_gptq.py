"""GPTQ's linear algebra against mlx-lm's, MLX's own packing, and rounding."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import pytest

from convert import Quantization
from convert.quantize.gptq import HessianRecorder, gptq_quantize, inverse_factor, pack

FORMS = [Quantization(group_size, bits) for group_size in (32, 64) for bits in (2, 3, 4, 5, 6, 8)]


def layer_and_inputs(width: int = 128, rows: int = 40) -> tuple[nn.Linear, mx.array]:
    """A linear layer, and inputs whose features depend on one another, some much larger."""
    keys = mx.random.split(mx.random.key(7), 4)
    linear = nn.Linear(width, rows, bias=False)
    linear.weight = mx.random.normal((rows, width), key=keys[0])
    mixing = mx.random.normal((width, width), key=keys[1]) / width**0.5
    sizes = mx.exp(mx.random.normal((width,), key=keys[2]))
    return linear, mx.random.normal((2, 96, width), key=keys[3]) @ mixing * sizes


def hessian_of(linear: nn.Linear, x: mx.array) -> mx.array:
    recorder = HessianRecorder(linear)
    assert mx.array_equal(recorder(x), linear(x))
    return recorder.hessian


def output_error(
    linear: nn.Linear, x: mx.array, form: Quantization, parts: Sequence[mx.array]
) -> float:
    """Mean square of what quantization does to a layer's output."""
    packed, scales, biases = parts
    weight = mx.dequantize(
        packed, scales.astype(mx.float32), biases.astype(mx.float32), form.group_size, form.bits
    )
    return float((x @ (weight - linear.weight).T).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_as_mlx_unpacks(bits: int) -> None:
    codes = mx.random.randint(0, 2**bits, (5, 128), key=mx.random.key(bits)).astype(mx.uint32)
    ones, zeros = mx.ones((5, 2)), mx.zeros((5, 2))
    packed = pack(codes, bits)
    assert (packed.dtype, packed.shape) == (mx.uint32, (5, 128 * bits // 32))
    assert mx.array_equal(mx.dequantize(packed, ones, zeros, 64, bits), codes.astype(mx.float32))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [96, 128, 192])
def test_closer_than_mlx_lms(bits: int, width: int) -> None:
    from mlx_lm.quant.gptq import gptq_quantize as theirs

    linear, x = layer_and_inputs(width)
    form = Quantization(32, bits)
    made = gptq_quantize(linear.weight, hessian_of(linear, x), form, mx.float32)
    model = nn.Sequential(linear)
    theirs(model, x, bits, 32, bits, 32, batch_size=1)
    other = model.layers[0]
    assert [array.shape for array in made] == [
        other[name].shape for name in ("weight", "scales", "biases")
    ]
    error = output_error(linear, x, form, made)
    assert error < 0.6 * output_error(linear, x, form, [other.weight, other.scales, other.biases])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_outputs_are_closer_than_rounded(form: Quantization, dtype: mx.Dtype) -> None:
    linear, x = layer_and_inputs()
    made = gptq_quantize(linear.weight, hessian_of(linear, x), form, dtype)
    rounded = mx.quantize(linear.weight.astype(dtype), form.group_size, form.bits)
    assert [(part.shape, part.dtype) for part in made] == [
        (part.shape, part.dtype) for part in rounded
    ]
    error = output_error(linear, x, form, made)
    assert error < 0.6 * output_error(linear, x, form, rounded)


def test_independent_features_are_rounded() -> None:
    """Where no feature can make up for another, nothing is left but rounding."""
    linear, _ = layer_and_inputs()
    made = gptq_quantize(linear.weight, mx.eye(128), Quantization(32, 4), mx.float32)
    assert all(map(mx.array_equal, made, mx.quantize(linear.weight, 32, 4)))


@pytest.mark.parametrize("kind", ["zero", "one feature", "one input"])
def test_hessians_without_an_inverse(kind: str) -> None:
    linear, x = layer_and_inputs()
    hessian = {
        "zero": mx.zeros((128, 128)),
        "one feature": mx.zeros((128, 128)).at[5, 5].add(1e6),
        "one input": x[0, :1].T @ x[0, :1],
    }[kind]
    assert mx.all(mx.isfinite(inverse_factor(hessian)))
    packed, scales, biases = gptq_quantize(linear.weight, hessian, Quantization(64, 4), mx.float32)
    assert mx.all(mx.isfinite(scales) & mx.isfinite(biases))
    values = mx.dequantize(packed, scales, biases, 64, 4)
    assert mx.abs(values - linear.weight).max() < 2  # of weights that are as large as 4


def test_the_factor_is_the_papers() -> None:
    import numpy as np

    _, x = layer_and_inputs()
    rows = np.array(x.reshape(-1, 128), dtype=np.float64)
    hessian = rows.T @ rows
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(128)
    expected = np.linalg.cholesky(np.linalg.inv(hessian)).T
    found = np.array(inverse_factor(mx.array(np.float32(rows.T @ rows))))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
