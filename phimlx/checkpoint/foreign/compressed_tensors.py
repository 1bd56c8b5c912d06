"""Layers of compressed-tensors, as llm-compressor writes them for vLLM.

pack-quantized: `weight_packed` [rows, width * bits / 32] holds numbers from the lowest bit on, more
by 2^(bits - 1) than they are; `weight_zero_point` [rows * bits / 32, groups] is packed alike, down.
int-, float- and naive-quantized: `weight` [rows, width] in I8 or F8_E4M3, its zero points in I8.
`weight_scale` has one number, one for each row, group of a row or block. `weight_g_idx` [width]
tells each column's group where they are not in order.

Source: compressed-tensors 0.20, `compressors/pack_quantized`, `compressors/naive_quantized` and
`quantization/lifecycle/forward_helpers.py` (`_dequantize`); 0.9 for `weight_g_idx`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import mlx.core as mx

from phimlx.checkpoint.foreign.fp8 import block_scales
from phimlx.checkpoint.foreign.packed import (
    PackedLayer,
    PackedWeight,
    scaled,
    spread,
    unpack,
    words_of,
)
from phimlx.checkpoint.tensors import FLOATING_DTYPES
from phimlx.errors import ConfigError, shortened

FORMATS = re.compile(r"(pack|int|float|naive)-quantized|mixed-precision|dense")


@dataclass(frozen=True)
class CompressedWeight(PackedWeight):
    """A weight of compressed-tensors.

    Attributes:
        bits: of packed numbers; None where each has its own byte.
        block: rows and columns that share a scale.
        loose: whether a word holds whole numbers only, as before version 0.13.
    """

    bits: int | None
    block: tuple[int, int]
    loose: bool = False

    by_rows = frozenset({"weight", "weight_packed"})

    def decode(self, parts: Mapping[str, mx.array], first: int, last: int) -> mx.array:
        if "weight_shape" in parts and parts["weight_shape"].tolist() != list(self.shape):
            raise self.misfit(
                f"weight_shape says {shortened(parts['weight_shape'].tolist())}, not "
                f"{list(self.shape)}"
            )
        scales = parts["weight_scale"]
        numbers = self._numbers(parts)
        zeros = self._zero_points(parts)
        columns = self._columns(parts)
        if zeros is not None:
            numbers = numbers - self._spread(zeros, first, last, columns)
        return scaled(numbers, self._spread(scales, first, last, columns))

    def _numbers(self, parts: Mapping[str, mx.array]) -> mx.array:
        if self.bits is not None:
            words = words_of(parts["weight_packed"])
            return self._unpacked(words, self.shape[1]).astype(mx.int32) - (1 << self.bits - 1)
        numbers, dtype = parts["weight"], self.parts["weight"].dtype
        return numbers.astype(mx.int32) if dtype == "I8" else mx.from_fp8(numbers, mx.float32)

    def _zero_points(self, parts: Mapping[str, mx.array]) -> mx.array | None:
        """Read zero points, shaped as the scales; None where there are none."""
        zeros = parts.get("weight_zero_point")
        if zeros is None:
            return None
        dtype = self.parts["weight_zero_point"].dtype
        if dtype.startswith("F8"):
            return mx.from_fp8(zeros, mx.float32)
        if dtype != "I32" or self.bits is None:
            return zeros.astype(mx.int32)
        fields = self._unpacked(words_of(zeros.T), self.shape[0]).T
        return fields.astype(mx.int32) - (1 << self.bits - 1)

    def _unpacked(self, words: mx.array, count: int) -> mx.array:
        assert self.bits is not None
        if not self.loose:
            return unpack(words, self.bits, count)
        shifts = mx.arange(32 // self.bits, dtype=mx.uint32) * self.bits
        fields = (words[..., None] >> shifts) & ((1 << self.bits) - 1)
        return fields.reshape(words.shape[0], -1)[:, :count]

    def _columns(self, parts: Mapping[str, mx.array]) -> mx.array | None:
        """Read the group of each column; None where they are in order."""
        index = parts.get("weight_g_idx")
        if index is None or mx.any(index == -1).item():  # which says that it was not used
            return None
        self.group_of_each(index, parts["weight_scale"].shape[1])
        return index

    def _spread(
        self, values: mx.array, first: int, last: int, columns: mx.array | None
    ) -> mx.array:
        """Give each of these rows' numbers its group's value."""
        if values.size == 1 or self.block[0] > 1:
            return block_scales(values, self, self.block, first, last)
        rows = values.reshape(self.shape[0], -1)[first:last]
        if columns is not None:
            return rows[:, columns]
        return spread(rows, self.shape[1], self.block[1])


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for what changes more than the weights' form."""
    named = [place.get("format") for place in (settings, *_groups(settings))]
    names = [name if isinstance(name, str) else repr(name) for name in named if name is not None]
    unknown = [name for name in names if not FORMATS.fullmatch(name)]
    sparsity = settings.get("sparsity_config")
    sparse = str(sparsity.get("format")) if isinstance(sparsity, dict) else ""
    why = None
    if unknown:
        why = f"in the format {shortened(unknown[0])}, which phimlx does not read"
    elif sparse.startswith("sparse"):
        why = f"sparse as {shortened(sparse)}, which phimlx does not read"
    elif settings.get("transform_config"):
        why = "with transform_config: it rotates activations, which phimlx does not"
    if why is not None:
        raise ConfigError(
            f"config.json: quantization_config is another framework's (compressed-tensors), {why}.",
            hint="Convert the original model: phimlx convert MODEL --mlx-path OUT -q",
        )


def rounds_activations(settings: Mapping[str, Any]) -> bool:
    """Tell whether the framework rounds what goes into layers or comes out, or the cache, too."""
    kinds = ("input_activations", "output_activations")
    rounds = any(group.get(kind) for group in _groups(settings) for kind in kinds)
    return rounds or bool(settings.get("kv_cache_scheme"))


def read_layer(layer: PackedLayer, settings: Mapping[str, Any]) -> CompressedWeight:
    """Check a layer's tensors against one another; raises CheckpointError where they do not fit."""
    scales = layer.part("weight_scale", *FLOATING_DTYPES)
    names = ["weight_scale"]
    bits, loose = None, False
    if "weight_packed" in layer.parts:
        packed = layer.part("weight_packed", "I32", "U32", ndim=2)
        rows, width = packed.shape[0], layer.width
        bits, loose = _bits(layer, settings, packed.shape[1], width)
        names = ["weight_packed", *names]
    else:
        weight = layer.part("weight", "I8", "F8_E4M3", ndim=2)
        rows, width = weight.shape
        names = ["weight", *names]
    block = _block(layer, settings, rows, width)
    for name in ("weight_zero_point", "weight_g_idx", "weight_shape"):
        if name in layer.parts:
            names.append(name)
    if "weight_zero_point" in names:
        dtypes = ("I8", "I32", "I64", "F8_E4M3") if bits is None else ("I8", "I32")
        zeros = layer.part("weight_zero_point", *dtypes)
        shape = scales.shape
        if bits is not None and zeros.dtype == "I32":
            fields = 32 // bits if loose else 32 / bits
            shape = (ceil(rows / fields), *shape[1:])
        layer.check("weight_zero_point", shape)
    if "weight_g_idx" in names:
        layer.part("weight_g_idx", "I32", "I64")
        layer.check("weight_g_idx", (width,))
        if len(scales.shape) != 2 or block[0] != 1:
            raise layer.misfit("weight_g_idx goes with groups only")
    if "weight_shape" in names:
        layer.part("weight_shape", "I64", "I32")
        layer.check("weight_shape", (2,))
    return CompressedWeight(
        layer.framework,
        layer.path,
        (rows, width),
        layer.out_dtype(scales.dtype),
        {name: layer.parts[name] for name in names},
        bits,
        block,
        loose,
    )


def _bits(
    layer: PackedLayer, settings: Mapping[str, Any], words: int, width: int
) -> tuple[int, bool]:
    """Find how many bits numbers have, and whether words hold whole ones only, from the shape."""
    fitting = [
        (bits, loose)
        for loose in (False, True)
        for bits in range(1, 9)
        if words == (ceil(width / (32 // bits)) if loose else ceil(width * bits / 32))
    ]
    told = [weights.get("num_bits") for weights in weight_settings(settings)]
    fitting.sort(key=lambda form: form[0] not in told)
    if not fitting:
        raise layer.misfit(f"weight_packed has {words} words for rows of {width} numbers")
    return fitting[0]


def _block(
    layer: PackedLayer, settings: Mapping[str, Any], rows: int, width: int
) -> tuple[int, int]:
    """Find how many rows and columns share a scale, from the shape of the scales."""
    shape = layer.parts["weight_scale"].shape
    if shape in ((), (1,), (1, 1)):
        return (max(1, rows), max(1, width))
    for height, length in _block_structures(settings):
        if shape == (ceil(rows / height), ceil(width / length)):
            return (height, length)
    if shape == (rows,):
        return (1, max(1, width))
    if len(shape) == 2 and shape[0] == rows and shape[1] and width % shape[1] == 0:
        return (1, width // shape[1])
    raise layer.misfit(
        f"weight_scale has shape {list(shape)}, which does not divide [{rows}, {width}]"
    )


def weight_settings(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List what a config says of the weights of each group of layers."""
    found = [group.get("weights") for group in _groups(settings)]
    return [weights for weights in found if isinstance(weights, dict)]


def _block_structures(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    for weights in weight_settings(settings):
        size = weights.get("block_structure")
        if isinstance(size, list) and len(size) == 2:
            height, length = size
            if type(height) is int and type(length) is int and height > 0 and length > 0:
                yield height, length


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    values = groups.values() if isinstance(groups, dict) else ()
    return [group for group in values if isinstance(group, dict)]
