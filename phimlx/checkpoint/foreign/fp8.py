"""Layers in 8-bit floating point: Hugging Face's fine-grained fp8, AutoFP8's, and fbgemm's.

`weight` [rows, width] in F8_E4M3. Fine-grained: `weight_scale_inv` [rows / 128, width / 128], a
factor for each block, or one number for all. AutoFP8, of the same `quant_method`: `weight_scale`,
one number. fbgemm: `weight_scale` [rows, 1].

Source: transformers 5, `integrations/finegrained_fp8.py` (`Fp8Dequantize`) and
`integrations/fbgemm_fp8.py`; vLLM, `quantization/fp8.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from phimlx.checkpoint.foreign.packed import PackedLayer, PackedWeight
from phimlx.checkpoint.tensors import FLOATING_DTYPES
from phimlx.errors import ConfigError, shortened

ONE = ((), (1,), (1, 1))  # shapes of a scale for all
EXPONENTS = ("U8", "F8_E8M0")  # of scales that are powers of two


@dataclass(frozen=True)
class BlockWeight(PackedWeight):
    """A weight in fp8 with a scale for each block, [rows, columns] of which `block` tells."""

    block: tuple[int, int]

    by_rows = frozenset({"weight"})

    def decode(self, parts: Mapping[str, mx.array], first: int, last: int) -> mx.array:
        numbers = mx.from_fp8(parts["weight"], mx.float32)
        scales = parts[next(name for name in self.parts if name != "weight")]
        if scales.dtype == mx.uint8:
            bits = mx.maximum(scales.astype(mx.uint32) << 23, 1 << 22)  # 2^-127 has no exponent
            scales = bits.view(mx.float32)
        return numbers * block_scales(scales.astype(mx.float32), self, self.block, first, last)


def block_scales(
    scales: mx.array, weight: PackedWeight, block: tuple[int, int], first: int, last: int
) -> mx.array:
    """Repeat the scales of blocks for the numbers of these rows, as far as that is needed."""
    if scales.size == 1:
        return scales.reshape(1, 1)
    height, width = block
    top = first // height
    rows = mx.repeat(scales[top : -(-last // height)], height, axis=0)
    rows = rows[first - top * height : last - top * height]
    return mx.repeat(rows, width, axis=1)[:, : weight.shape[1]]


def read_layer(layer: PackedLayer, settings: Mapping[str, Any]) -> BlockWeight:
    """Check the tensors of a layer with `quant_method` fp8 against one another.

    Raises:
        ConfigError, CheckpointError: where they do not fit.
    """
    rows, width = layer.part("weight", "F8_E4M3", ndim=2).shape
    if "weight_scale_inv" not in layer.parts:
        scales = layer.part("weight_scale", *FLOATING_DTYPES)
        layer.check("weight_scale", *ONE)
        return _weight(layer, "weight_scale", scales.dtype, (rows, width))
    scales = layer.part("weight_scale_inv", *FLOATING_DTYPES, *EXPONENTS)
    block = _block_size(settings)
    if block is None:
        layer.check("weight_scale_inv", *ONE)
        return _weight(layer, "weight_scale_inv", scales.dtype, (rows, width))
    layer.check("weight_scale_inv", (-(-rows // block[0]), -(-width // block[1])))
    return _weight(layer, "weight_scale_inv", scales.dtype, block)


def read_fbgemm_layer(layer: PackedLayer, settings: Mapping[str, Any]) -> BlockWeight:
    """Check a layer of fbgemm's; raises CheckpointError where its tensors do not fit."""
    weight = layer.part("weight", "F8_E4M3", ndim=2)
    scales = layer.part("weight_scale", *FLOATING_DTYPES)
    rows, width = weight.shape
    layer.check("weight_scale", (rows, 1))
    return _weight(layer, "weight_scale", scales.dtype, (1, max(1, width)))


def _weight(layer: PackedLayer, scale: str, dtype: str, block: tuple[int, int]) -> BlockWeight:
    own = "BF16" if dtype in EXPONENTS else dtype
    parts = {name: layer.parts[name] for name in ("weight", scale)}
    shape = parts["weight"].shape
    return BlockWeight(layer.framework, layer.path, shape, layer.out_dtype(own), parts, block)


def _block_size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Read the rows and columns of a block; None where there is one scale for all."""
    size = settings.get("weight_block_size", [128, 128])
    if size is None:
        return None
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return (size[0], size[1])
    raise ConfigError(
        f"config.json: quantization_config.weight_block_size is {shortened(size)}, not two whole "
        "numbers above 0."
    )
