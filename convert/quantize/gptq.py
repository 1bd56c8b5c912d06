"""GPTQ's linear algebra: a weight matrix rounded so that the rest of each row makes up for errors.

Source: arXiv 2210.17323, algorithm 1; the scales and biases of a group are those that MLX's affine
quantizer computes from what the groups before it have left. Everything is computed in float32, the
factor of the Hessian in float64.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from convert.quantize.recipe import Quantization

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
    factor = inverse_factor(hessian)
    size, highest = form.group_size, 2**form.bits - 1
    rest = weight.astype(mx.float32).T  # [in, out], of which the first rows are dealt with
    groups: list[tuple[mx.array, mx.array, mx.array]] = []
    for begin in range(0, weight.shape[1], size):
        end = begin + size
        group, rest = rest[:size], rest[size:]
        _, scales, biases = mx.quantize(mx.contiguous(group.T), size, form.bits)
        scales, biases = scales.astype(dtype), biases.astype(dtype)  # [out, 1]
        scale, bias = (array.T.astype(mx.float32) for array in (scales, biases))  # [1, out]
        codes, errors = [], []
        for column in range(begin, end):
            value, group = group[:1], group[1:]
            code = mx.clip(mx.round((value - bias) / scale), 0, highest)
            error = (value - (code * scale + bias)) / factor[column, column]
            group = group - factor[column, column + 1 : end, None] * error
            codes.append(code)
            errors.append(error)
        rest = rest - factor[begin:end, end:].T @ mx.concatenate(errors)
        packed = pack(mx.concatenate(codes).T.astype(mx.uint32), form.bits)
        mx.eval(rest, packed, scales, biases)
        groups.append((packed, scales, biases))
    packed, scales, biases = (
        mx.concatenate(list(parts), axis=1) for parts in zip(*groups, strict=True)
    )
    return packed, scales, biases


def inverse_factor(hessian: mx.array) -> mx.array:
    """The upper triangular U with UᵀU = (H + damping)⁻¹, `[in, in]`, in float32.

    With J that reverses the order of rows or columns and L the Cholesky factor of J H J, U is
    J L⁻¹ J: one factor and one inverse of a triangle, where the paper has three factors. In float64
    for wide layers, whose Hessian may have a condition of a million.
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
        codes: uint32 `[out, n]`, below 2 ** bits; 32 divides n.

    Returns:
        uint32 `[out, n * bits / 32]`.
    """
    places = mx.arange(32, dtype=mx.uint32)
    stream = (codes[..., None] >> places[:bits]) & 1  # [out, n, bits]
    return (stream.reshape(codes.shape[0], -1, 32) << places).sum(axis=-1)
