"""One tensor of a checkpoint -> the tensors that stand for it in the output.

Knows dtypes and MLX's quantization; knows nothing of files.
"""

from __future__ import annotations

import mlx.core as mx

from convert.recipe import Quantization
from phimlx.errors import ConversionError

# Integer types of the same size, and the bits of infinity.
INFINITIES = {
    mx.float32: (mx.int32, mx.uint32, 0x7F800000),
    mx.float16: (mx.int16, mx.uint16, 0x7C00),
    mx.bfloat16: (mx.int16, mx.uint16, 0x7F80),
}


def cast(name: str, array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """A tensor in `dtype`, or in its own where that is None.

    Raises:
        ConversionError: where it holds NaN or infinity, before or after.
    """
    if not _is_finite(array):
        raise ConversionError(
            f"{name} holds NaN or infinity: this model is damaged.",
            hint="Download it again.",
        )
    if dtype is None or dtype == array.dtype:
        return array
    array = array.astype(dtype)
    if not _is_finite(array):
        raise ConversionError(
            f"{name} holds numbers too large for {str(dtype).rpartition('.')[2]}.",
            hint="Choose bfloat16 or float32.",
        )
    return array


def quantize(name: str, array: mx.array, quantization: Quantization | None) -> dict[str, mx.array]:
    """What a tensor becomes. Nothing is computed until the results are evaluated.

    Args:
        name: of a layer's `.weight`, where it is to be quantized.
        array: `[rows, width]`, where it is to be quantized.

    Returns:
        The tensor itself, or `.weight` `[rows, width * bits / 32]` with `.scales` and `.biases`
        `[rows, width / group_size]` beside it.
    """
    if quantization is None:
        return {name: array}
    parts = mx.quantize(
        array,
        group_size=quantization.group_size,
        bits=quantization.bits,
        mode=quantization.mode,
    )
    path = name.removesuffix(".weight")
    names = (f"{path}.weight", f"{path}.scales", f"{path}.biases")
    return dict(zip(names, parts, strict=False))  # modes other than affine have no biases


def _is_finite(array: mx.array) -> bool:
    """Whether no exponent is all ones.

    Read as integers, positive numbers stand in their own order and negative ones in reverse, so
    that the largest signed and the largest unsigned integer tell; this takes no memory, and a
    tenth of the time of `mx.isfinite`.
    """
    signed, unsigned, infinity = INFINITIES[array.dtype]
    negative_infinity = infinity | 1 << 8 * array.dtype.size - 1
    below = array.view(signed).max() < mx.array(infinity, signed)
    above = array.view(unsigned).max() < mx.array(negative_infinity, unsigned)
    return bool((below & above).item())
