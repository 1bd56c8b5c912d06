"""MLX's affine quantization in torch, so that training can feel what 4-bit weights do.

It rounds every matrix that `phimlx convert -q` would quantize; it stores nothing in packed form.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def quantize_dequantize(weight: torch.Tensor, bits: int = 4, group_size: int = 64) -> torch.Tensor:
    """The values that mlx.core.dequantize(mlx.core.quantize(weight)) gives. [out, in] -> [out, in]

    Source: affine_quantize in mlx/backend/cpu/quantized.cpp: per group of `group_size` inputs one
    scale and one bias, with the larger extreme of the group represented exactly.
    """
    groups = weight.float().unflatten(1, (-1, group_size))  # [out, groups, size]
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    levels = 2**bits - 1
    from_low = low.abs() > high.abs()
    scale = ((high - low) / levels).clamp(min=1e-7)
    scale = torch.where(from_low, scale, -scale)
    edge = torch.where(from_low, low, high)
    steps = torch.round(edge / scale)
    exact = steps != 0
    scale = torch.where(exact, edge / steps.where(exact, torch.ones_like(steps)), scale)
    bias = torch.where(exact, edge, torch.zeros_like(edge))
    codes = torch.round((groups - bias) / scale).clamp(0, levels)
    return (codes * scale + bias).flatten(1).to(weight.dtype)


def matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Every matrix that 4-bit conversion touches: linear layers and the embedding."""
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


@contextmanager
def quantized(model: torch.nn.Module) -> Iterator[None]:
    """Within, the model computes with 4-bit weights; gradients reach the full ones unchanged
    (the straight-through estimator, Bengio et al. 2013)."""
    full = [parameter.data.clone() for parameter in matrices(model)]
    for parameter in matrices(model):
        parameter.data.copy_(quantize_dequantize(parameter.data))
    try:
        yield
    finally:
        for parameter, data in zip(matrices(model), full, strict=True):
            parameter.data.copy_(data)
