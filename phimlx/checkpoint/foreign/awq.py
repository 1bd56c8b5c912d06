"""AWQ's layers, as AutoAWQ packs them for its kernels GEMM and GEMV.

GEMM: `qweight` [width, rows / 8] and `qzeros` [groups, rows / 8] hold eight numbers a word in the
order 0, 2, 4, 6, 1, 3, 5, 7; `scales` [groups, rows]. GEMV: `qweight` [rows, width / 8] in plain
order, `qzeros` [rows, groups / 8] and `scales` [rows, groups], both padded.

Source: AutoAWQ 0.2.9, `utils/packing_utils.py` (`dequantize_gemm`), `modules/linear/gemv.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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

VERSIONS = ("gemm", "gemv")
# Where in a word the eight numbers stand, in the order of the weight's rows.
SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


@dataclass(frozen=True)
class GemmWeight(PackedWeight):
    """A weight of AWQ's for its kernel GEMM."""

    group_size: int

    def decode(self, parts: Mapping[str, mx.array], first: int, last: int) -> mx.array:
        def fields(name: str) -> mx.array:
            """Numbers of these rows, [rows, columns or groups]."""
            begin, end = first // 8, -(-last // 8)
            words = words_of(parts[name])[:, begin:end]
            numbers = (words[..., None] >> mx.array(SHIFTS, mx.uint32)) & 15
            numbers = numbers.reshape(words.shape[0], -1).astype(mx.int32)
            return numbers[:, first - 8 * begin : last - 8 * begin].T

        width = self.shape[1]
        scales = parts["scales"][:, first:last].T
        zeros = spread(fields("qzeros"), width, self.group_size)
        return scaled(fields("qweight") - zeros, spread(scales, width, self.group_size))


@dataclass(frozen=True)
class GemvWeight(PackedWeight):
    """A weight of AWQ's for its kernel GEMV."""

    group_size: int

    by_rows = frozenset({"qweight", "qzeros", "scales"})

    def decode(self, parts: Mapping[str, mx.array], first: int, last: int) -> mx.array:
        width = self.shape[1]
        groups = width // self.group_size
        numbers = unpack(words_of(parts["qweight"]), 4, width).astype(mx.int32)
        zeros = unpack(words_of(parts["qzeros"]), 4, groups).astype(mx.int32)
        zeros = spread(zeros, width, self.group_size)
        return scaled(numbers - zeros, spread(parts["scales"][:, :groups], width, self.group_size))


def read_layer(layer: PackedLayer, settings: Mapping[str, Any]) -> PackedWeight:
    """Check a layer's tensors against one another.

    Raises:
        ConfigError: for a format that is not read.
        CheckpointError: where they do not fit.
    """
    version = settings.get("version", settings.get("format", "gemm"))
    version = version.lower() if isinstance(version, str) else version
    if version not in VERSIONS:
        raise ConfigError(
            f"config.json: quantization_config is another framework's (AWQ), in the version "
            f"{shortened(version)}, which phimlx does not read; it reads {' and '.join(VERSIONS)}.",
            hint="Convert the original model: phimlx convert MODEL --mlx-path OUT -q",
        )
    qweight = layer.part("qweight", "I32", "U32", ndim=2)
    qzeros = layer.part("qzeros", "I32", "U32", ndim=2)
    scales = layer.part("scales", *FLOATING_DTYPES, ndim=2)
    width = layer.width
    if version == "gemm":
        rows, groups = 8 * qweight.shape[1], scales.shape[0]
        layer.check("qweight", (width, rows // 8))
        group_size = _divided(layer, groups)
        layer.check("scales", (groups, rows))
        layer.check("qzeros", (groups, rows // 8))
        kind: type[GemmWeight | GemvWeight] = GemmWeight
    else:
        rows = qweight.shape[0]
        layer.check("qweight", (rows, -(-width // 8)))
        size = settings.get("group_size", settings.get("q_group_size"))
        group_size = size if type(size) is int and size > 0 else width
        groups = _divided(layer, group_size)  # the count of groups, which divides it as well
        if scales.shape[0] != rows or scales.shape[1] < groups:
            raise layer.misfit(f"scales has shape {list(scales.shape)}")
        if qzeros.shape[0] != rows or 8 * qzeros.shape[1] < groups:
            raise layer.misfit(f"qzeros has shape {list(qzeros.shape)}")
        kind = GemvWeight
    return kind(
        layer.framework,
        layer.path,
        (rows, width),
        layer.out_dtype(scales.dtype),
        {name: layer.parts[name] for name in ("qweight", "qzeros", "scales")},
        group_size,
    )


def _divided(layer: PackedLayer, count: int) -> int:
    if not count or layer.width % count:
        raise layer.misfit(f"{count} does not divide its {layer.width} columns")
    return layer.width // count
