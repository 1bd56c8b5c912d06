"""bitsandbytes' layers: NF4 and FP4 with a scale for each block, and LLM.int8().

4 bits: `weight` holds two numbers a byte, the first in the upper half, row after row;
`weight.absmax` a scale for each block of them. Where that is quantized itself, its numbers are
`weight.nested_quant_map[absmax] * weight.nested_absmax`, by blocks too, and `nested_offset`.
`weight.quant_state.bitsandbytes__nf4`, or `__fp4`, is JSON: blocksize, shape, dtype and so on.
8 bits: `weight` [rows, width] in I8 and `SCB` [rows], its largest magnitudes.

Source: bitsandbytes 0.50, `functional.py` (`dequantize_4bit`, `QuantState`) and
`backends/default/ops.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from phimlx.checkpoint.foreign.packed import PackedLayer, PackedWeight
from phimlx.checkpoint.tensors import ELEMENT_DTYPES, STORED_DTYPES, StoredRows, TensorInfo
from phimlx.errors import CheckpointError, shortened
from phimlx.files import parse_json_object

STATE = "weight.quant_state.bitsandbytes__"
LONGEST_STATE = 64 << 10
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
CODES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(  # its second zero is positive too
        (sign * number + 0.0) / 12
        for sign in (1.0, -1.0)
        for number in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}


@dataclass(frozen=True)
class State:
    """What `quant_state` says of a layer, checked.

    Attributes:
        nested_size, offset: of scales that are quantized themselves.
    """

    block_size: int
    dtype: mx.Dtype
    nested_size: int
    offset: float


@dataclass(frozen=True)
class FourBitWeight(PackedWeight):
    """A weight in NF4 or FP4."""

    code: str

    def reads(self, first: int, last: int) -> tuple[StoredRows, ...]:
        packed = self.parts["weight"]
        size = ELEMENT_DTYPES[packed.dtype].size
        halves = self.shape[1] // 2 // size  # rows of the stored tensor in one of the weight
        others = [info for name, info in self.parts.items() if name != "weight"]
        return (
            StoredRows(packed, first * halves, last * halves),
            *(StoredRows(info, 0, info.count) for info in others),
        )

    def decode(self, parts: Mapping[str, mx.array], first: int, last: int) -> mx.array:
        width = self.shape[1]
        state = self._state(parts[f"{STATE}{self.code}"])
        size = state.block_size
        if math.ceil(self.shape[0] * width / size) != parts["weight.absmax"].size:
            raise self.misfit(f"{parts['weight.absmax'].size} blocks of {size} do not make it")
        begin, end = first * width, last * width
        block, last_block = begin // size, -(-end // size)
        scales = self._scales(parts, state, block, last_block)
        code = CODES[self.code]
        pairs = mx.array([(upper, lower) for upper in code for lower in code]).view(mx.uint64)
        data = parts["weight"].reshape(-1).view(mx.uint8)
        # two numbers are taken as one word: MLX takes single ones much faster than rows
        numbers = mx.take(pairs, data.astype(mx.uint32)).view(mx.float32)
        if begin % size == end % size == 0:
            decoded = numbers.reshape(-1, size) * scales[:, None]
        else:
            factors = mx.repeat(scales, size)[begin - block * size : end - block * size]
            decoded = numbers * factors
        return decoded.reshape(last - first, width).astype(state.dtype)

    def _scales(
        self, parts: Mapping[str, mx.array], state: State, first: int, last: int
    ) -> mx.array:
        """Read scales `first` to `last` (not included) as float32."""
        scales = parts["weight.absmax"].reshape(-1)[first:last]
        if "weight.nested_absmax" not in parts:
            return scales.astype(mx.float32)
        size = state.nested_size
        count = math.ceil(parts["weight.absmax"].size / size)
        if parts["weight.nested_absmax"].size != count:
            raise self.misfit(f"its scales are not {count} blocks of {size}")
        numbers = mx.take(parts["weight.nested_quant_map"].reshape(-1), scales.astype(mx.uint32))
        factors = parts["weight.nested_absmax"].reshape(-1)[first // size : -(-last // size)]
        top = first // size * size
        spreaded = mx.repeat(factors, size)[first - top : last - top]
        return numbers * spreaded + state.offset

    def _state(self, data: mx.array) -> State:
        """Check the JSON that comes with the weight; raises CheckpointError."""
        text = bytes(memoryview(data))  # type: ignore[arg-type]
        place = f"{STATE}{self.code} of {self.path[-100:]}"
        state = parse_json_object(text, place, CheckpointError)
        nested = "weight.nested_absmax" in self.parts

        def known(key: str, *values: object) -> Any:
            found = state.get(key)
            if isinstance(found, bool) or not isinstance(found, str | int) or found not in values:
                raise self.misfit(f"{key} of its quant_state is {shortened(found)}")
            return found

        if state.get("shape") != list(self.shape):
            raise self.misfit(
                f"shape of its quant_state is {shortened(state.get('shape'))}, not "
                f"{list(self.shape)}"
            )
        known("quant_type", self.code)
        offset = state.get("nested_offset", 0.0) if nested else 0.0
        if type(offset) not in (int, float) or not abs(offset) < 1e30:
            raise self.misfit(f"nested_offset of its quant_state is {shortened(offset)}")
        return State(
            known("blocksize", *BLOCK_SIZES),
            DTYPES[known("dtype", *DTYPES)],
            known("nested_blocksize", *BLOCK_SIZES) if nested else 1,
            float(offset),
        )


@dataclass(frozen=True)
class Int8Weight(PackedWeight):
    """A weight of LLM.int8()."""

    by_rows = frozenset({"weight", "SCB"})

    def decode(self, parts: Mapping[str, mx.array], first: int, last: int) -> mx.array:
        layout = parts.get("weight_format")
        if layout is not None and any(layout.reshape(-1).tolist()):  # type: ignore[arg-type]
            raise self.misfit("its weight is in the layout of one kind of GPU")
        scales = parts["SCB"].reshape(-1, 1)
        return parts["weight"].astype(mx.float32) * scales * 7.874015718698502e-3


def read_layer(layer: PackedLayer, settings: Mapping[str, Any]) -> PackedWeight:
    """Check a layer's tensors against one another; raises CheckpointError where they do not fit."""
    if "SCB" in layer.parts:
        weight = layer.part("weight", "I8", ndim=2)
        layer.part("SCB", "F32")
        layer.check("SCB", weight.shape[:1], (weight.shape[0], 1))
        names = [name for name in ("weight", "SCB", "weight_format") if name in layer.parts]
        if "weight_format" in layer.parts:
            layer.part("weight_format", "U8")
            layer.check("weight_format", (), (1,))
        parts = {name: layer.parts[name] for name in names}
        dtype = layer.out_dtype("F32")
        return Int8Weight(layer.framework, layer.path, weight.shape, dtype, parts)
    return _four_bits(layer)


def _four_bits(layer: PackedLayer) -> FourBitWeight:
    weight = layer.part("weight", "U8", "I8", *STORED_DTYPES)
    absmax = layer.part("weight.absmax", "F32", "U8", "F16", "BF16")
    code = next((code for code in CODES if f"{STATE}{code}" in layer.parts), None)
    if code is None:
        raise layer.misfit("it lacks quant_state.bitsandbytes__nf4 or __fp4")
    state = layer.part(f"{STATE}{code}", "U8", ndim=1)
    if state.shape[0] > LONGEST_STATE:
        raise layer.misfit(f"its quant_state has {state.shape[0]:,} bytes")
    names = ["weight", "weight.absmax", f"{STATE}{code}"]
    if absmax.dtype == "U8":
        layer.part("weight.nested_absmax", "F32")
        layer.part("weight.nested_quant_map", "F32")
        layer.check("weight.nested_quant_map", (256,))
        names += ["weight.nested_absmax", "weight.nested_quant_map"]
    elif "weight.nested_absmax" in layer.parts:
        raise layer.misfit(f"weight.absmax is stored as {absmax.dtype}, not U8")
    rows, rest = divmod(2 * weight.nbytes, layer.width) if layer.width else (0, 1)
    size = ELEMENT_DTYPES[weight.dtype].size
    lies_flat = weight.shape[1:] == (1,) or len(weight.shape) == 1
    if rest or layer.width % (2 * size) or not lies_flat:
        raise layer.misfit(
            f"weight has shape {list(weight.shape)}, which does not make rows of {layer.width} "
            "numbers"
        )
    parts: dict[str, TensorInfo] = {name: layer.parts[name] for name in names}
    dtype = layer.out_dtype("F32")
    return FourBitWeight(layer.framework, layer.path, (rows, layer.width), dtype, parts, code)
