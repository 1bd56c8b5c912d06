"""GPTQ's linear algebra: a weight matrix rounded so that the rest of each row makes up for errors.

Source: arXiv 2210.17323, algorithm 1, with the columns in the order of falling importance and each
group's scale from the weights as they were (`--act-order` and `--static-groups` of the authors'
code, IST-DASLab/gptq). Scales and biases are those of MLX's affine quantizer. Everything is
computed in float32, the factor of the Hessian in float64.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from convert.quantize.recipe import Quantization

BLOCK = 64  # columns between two updates of all that come later; a multiple of 32
DAMPING = 0.01  # of the Hessian's mean diagonal, added to all of it, as the paper's


class HessianRecorder(nn.Module):
    """Passes inputs on to a layer and sums x xᵀ over them.

    Attributes:
        hessian: float32 `[in, in]`, half the second derivative of the layer's squared error.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.hessian = mx.array(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self.hessian = self.hessian + rows.T @ rows
        return self.layer(x)


def gptq_quantize(
    weight: mx.array, hessian: mx.array, form: Quantization, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize a weight matrix for inputs of a given second moment.

    Args:
        weight: `[out, in]`.
        hessian: `[in, in]`, the sum of x xᵀ over the inputs x.
        form: affine, in groups that divide `in`.
        dtype: of scales and biases; errors are those of scales that are rounded to it.

    Returns:
        What `mx.quantize` returns: packed weight `[out, in * bits / 32]`, scales and biases
        `[out, in / group_size]`.
    """
    _, scales, biases = mx.quantize(weight.astype(mx.float32), form.group_size, form.bits)
    scales, biases = scales.astype(dtype), biases.astype(dtype)  # [out, in / group_size]
    order = mx.argsort(-mx.diag(hessian))  # of columns: those first where an error costs most
    factor = inverse_factor(hessian[order][:, order])
    groups = order // form.group_size
    rest = weight.astype(mx.float32).T[order]  # [in, out], without the rows that are dealt with
    rounded: list[mx.array] = []
    for begin in range(0, order.size, BLOCK):
        end = min(begin + BLOCK, order.size)
        block, rest = rest[:BLOCK], rest[BLOCK:]
        scale, bias = (
            array.T[groups[begin:end]].astype(mx.float32) for array in (scales, biases)
        )  # [columns of the block, out]
        codes, errors = [], []
        for row in range(end - begin):
            column = begin + row
            value, block = block[:1], block[1:]
            code = (value - bias[row]) / scale[row]
            code = mx.clip(mx.round(code), 0, 2**form.bits - 1)
            error = (value - (code * scale[row] + bias[row])) / factor[column, column]
            block = block - factor[column, column + 1 : end, None] * error
            codes.append(code.astype(mx.uint8))
            errors.append(error)
        rest = rest - factor[begin:end, end:].T @ mx.concatenate(errors)
        rounded.append(mx.concatenate(codes))
        mx.eval(rest, rounded[-1])
    found = mx.concatenate(rounded)[mx.argsort(order)].T  # [out, in]
    packed = [
        pack(found[:, begin : begin + BLOCK], form.bits) for begin in range(0, order.size, BLOCK)
    ]
    return mx.concatenate(packed, axis=1), scales, biases


def inverse_factor(hessian: mx.array) -> mx.array:
    """Compute the upper triangular U with UᵀU = (H + damping)⁻¹, `[in, in]`, float32.

    With J that reverses the order of rows or columns and L the Cholesky factor of J H J, U is
    J L⁻¹ J: one factor and one inverse of a triangle, where the paper has three factors. In
    float64, since the Hessian of a wide layer may have a condition of a million.
    """
    with mx.stream(mx.cpu):  # the only device that has float64 and these functions
        diagonal = mx.diag(hessian)
        mean = mx.maximum(diagonal.mean(), mx.finfo(mx.float32).smallest_normal)
        damped = mx.array(hessian)
        places = mx.arange(diagonal.size)
        damped[places, places] = diagonal + DAMPING * mean
        # Under one name, so that each matrix is freed when the next one is there.
        factor = damped.astype(mx.float64)[::-1, ::-1]
        factor = mx.linalg.tri_inv(mx.linalg.cholesky(factor))
        factor = factor[::-1, ::-1].astype(mx.float32)
        mx.eval(factor)
    return factor


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack numbers as MLX does: one after the other in a stream of bits, the lowest bit first.

    Args:
        codes: integers `[out, n]`, below 2 ** bits; 32 divides n.

    Returns:
        uint32 `[out, n * bits / 32]`.
    """
    places = mx.arange(32, dtype=mx.uint32)
    stream = (codes.astype(mx.uint32)[..., None] >> places[:bits]) & 1  # [out, n, bits]
    return (stream.reshape(codes.shape[0], -1, 32) << places).sum(axis=-1)
