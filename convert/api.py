"""The converter's way in: a request -> a checked plan -> what it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert.export.gguf import GgufPlan, plan_gguf
from convert.export.onnx import OnnxPlan, plan_onnx
from convert.plan import ConversionPlan, ConversionResult, plan_folder
from convert.quantize.recipe import Quantization, Recipe
from convert.read import WeightFiles
from convert.request import ConversionRequest


def plan_conversion(
    request: ConversionRequest, files: WeightFiles | None = None
) -> ConversionPlan | GgufPlan | OnnxPlan:
    """Check everything that can be known from the headers, and lay the output out.

    Args:
        files: how the source's weight files are opened; they are on this machine where None.

    Raises:
        ConfigError, CheckpointError: where the source is not a whole model, or the adapter not one
            for it.
        ConversionError: where the two make no sense together, or the output exists or has no room.
    """
    files = files or WeightFiles()
    if request.is_gguf:
        return plan_gguf(request, files)
    return plan_onnx(request, files) if request.is_onnx else plan_folder(request, files)


def convert(
    source: str | Path,
    out: str | Path,
    quantization: Quantization | Recipe | str | None = None,
    dtype: str | None = None,
    **settings: Any,
) -> ConversionResult:
    """Convert a model's folder.

    Args:
        settings: the other attributes of `ConversionRequest`, by name.

    Raises:
        PhimlxError: as `ConversionRequest`, `plan_conversion` and the plan's `run`.
    """
    return plan_conversion(ConversionRequest(source, out, quantization, dtype, **settings)).run()
