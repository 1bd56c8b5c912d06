"""GPTQ's layers, as AutoGPTQ and GPTQModel pack them.

`qweight` [width * bits / 32, rows] holds the numbers of a column of the transposed weight from the
lowest bit on, `qzeros` [groups, rows * bits / 32] the zero points, `scales` [groups, rows], and
`g_idx` [width] tells the group of each of the weight's columns. In the first version of the format
zero points are stored less one.

Source: GPTQModel 7.7, `nn_modules/qlinear/__init__.py` (`dequantize_weight`) and `utils/model.py`
(`convert_gptq_v1_to_v2_format_module`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import mlx.core as mx

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

BITS = (2, 3, 4, 8)
FORMATS = {"gptq": 1, "gptq_v2": 2}
# One in each zero point of a word.
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class GPTQWeight(PackedWeight):
    """A weight of GPTQ's.

    Attributes:
        version: of the format, 1 or 2.
        group_size: columns that share a scale, where `g_idx` does not tell.
    """

    bits: int
    version: int
    group_size: int

    def decode(self, parts: Mapping[str, mx.array], first: int, last: int) -> mx.array:
        rows, width = self.shape
        columns = words_of(parts["qweight"])[:, first:last].T  # [rows, words]
        numbers = unpack(columns, self.bits, width).astype(mx.int32)  # [rows, width]
        zeros = self._zeros(words_of(parts["qzeros"]), rows)[:, first:last].T  # [rows, groups]
        scales = parts["scales"][:, first:last].T
        in_order = True
        if "g_idx" in parts:
            groups = self.group_of_each(parts["g_idx"], scales.shape[1])
            in_order = groups == [column // self.group_size for column in range(width)]
        if in_order:
            zeros = spread(zeros, width, self.group_size)
            scales = spread(scales, width, self.group_size)
        else:
            zeros, scales = zeros[:, parts["g_idx"]], scales[:, parts["g_idx"]]
        return scaled(numbers - zeros, scales)

    def _zeros(self, words: mx.array, rows: int) -> mx.array:
        """Unpack zero points [groups, rows] as the library does.

        It adds the one of version 1 to whole words, so that what overflows is carried; where
        fields cross words it adds it to each.
        """
        if self.version == 2:
            return unpack(words, self.bits, rows).astype(mx.int32)
        if self.bits in ONES:
            words = words + mx.array(ONES[self.bits], mx.uint32)
            return unpack(words, self.bits, rows).astype(mx.int32)
        fields = unpack(words, self.bits, rows)
        return ((fields + 1) & ((1 << self.bits) - 1)).astype(mx.int32)


def read_layer(layer: PackedLayer, settings: Mapping[str, Any]) -> GPTQWeight:
    """Check a layer's tensors against one another.

    Raises:
        ConfigError: for a format that is not read.
        CheckpointError: where they do not fit.
    """
    version = _version(settings)
    qweight = layer.part("qweight", "I32", "U32", ndim=2)
    layer.part("qzeros", "I32", "U32", ndim=2)
    scales = layer.part("scales", *FLOATING_DTYPES, ndim=2)
    words, rows = qweight.shape
    width = layer.width
    bits = next((bits for bits in BITS if words == ceil(width * bits / 32)), None)
    if bits is None:
        raise layer.misfit(
            f"qweight has shape {list(qweight.shape)}, in which rows of {width} numbers do not fit "
            f"at {', '.join(map(str, BITS))} bits"
        )
    groups = scales.shape[0]
    layer.check("scales", (groups, rows))
    layer.check("qzeros", (groups, ceil(rows * bits / 32)))
    names = ["qweight", "qzeros", "scales"]
    group_size = _group_size(layer, settings, groups)
    if "g_idx" in layer.parts:
        layer.part("g_idx", "I32", ndim=1)
        layer.check("g_idx", (width,))
        names.append("g_idx")
    elif ceil(width / group_size) != groups:
        raise layer.misfit(f"{groups} groups of {group_size} do not make {width} columns")
    return GPTQWeight(
        layer.framework,
        layer.path,
        (rows, width),
        layer.out_dtype(scales.dtype),
        {name: layer.parts[name] for name in names},
        bits,
        version,
        group_size,
    )


def _version(settings: Mapping[str, Any]) -> int:
    name = settings.get("checkpoint_format", settings.get("format", "gptq"))
    if settings.get("is_marlin_format") is True:
        name = "marlin"
    version = FORMATS.get(name) if isinstance(name, str) else None
    if version is None:
        raise ConfigError(
            f"config.json: quantization_config is another framework's (GPTQ), in the format "
            f"{shortened(name)}, which phimlx does not read; it reads {' and '.join(FORMATS)}.",
            hint="Convert the original model: phimlx convert MODEL --mlx-path OUT -q",
        )
    return version


def _group_size(layer: PackedLayer, settings: Mapping[str, Any], groups: int) -> int:
    """Find the size of groups in order: the config's where it fits, else equal ones."""
    size = settings.get("group_size")
    if type(size) is int and size > 0 and ceil(layer.width / size) == groups:
        return size
    if not groups or layer.width % groups:
        raise layer.misfit(f"{groups} groups do not divide its {layer.width} columns")
    return layer.width // groups
