"""A conversion as a person asks for it, in one checked object."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from convert.quantize.calibrated import CalibrationSettings
from convert.quantize.recipe import PARTS, Quantization, Recipe
from phimlx.checkpoint.folder import DTYPES
from phimlx.errors import ConversionError

SHARD_BYTES = 5 << 30  # as mlx-lm's

LAYOUTS = {"mlx": "mlx", "hf": "pt"}  # of a folder, and what its safetensors files say they are
GGUF_TYPES = {"gguf": "F16", "gguf-q8_0": "Q8_0"}  # of a GGUF file, and its weights' type
ONNX_TYPES = {"onnx": "fp32", "onnx-int4": "int4"}  # of a folder, and its weights' type


@dataclass(frozen=True)
class ConversionRequest:
    """A model, what is to become of it, and where; checked as far as the model need not be read.

    Attributes:
        source: the model's folder, in Hub layout or MLX's, or its GGUF file.
        out: the folder to make, or the GGUF file.
        quantization: of all layers alike, by a recipe, or by the recipe of this name that the
            model's architecture has. None makes weights that are not quantized.
        dtype: "float32", "float16" or "bfloat16" for what is not quantized; None keeps each
            tensor's own.
        dequantize: whether unquantized weights are meant where the source is quantized.
        group_size: other than the recipe's own.
        parts: "adapters", "encoders": what of a multimodal model is quantized too, to 8 bits. Else
            it stays as it is, where no rule of the recipe names it.
        layout: "mlx"; "hf" as published on the Hub, which has no quantized weights; "gguf" or
            "gguf-q8_0", one file for llama.cpp; "onnx" or "onnx-int4", a folder for ONNX Runtime.
        split_projections: whether what the architecture fuses is written as the projections that
            others have in its place, with a config of their layout; in Hub layout.
        calibration: a method by which quantized weights are found, "gptq" or "dwq" for that with
            its defaults; they are rounded where None.
        adapter: a folder whose adapter is fused into the weights. Quantized ones are quantized
            again as they were, where nothing else is asked for.
        tokenizer: a folder whose tokenizer and chat template are taken in place of the source's.
        shard_bytes: largest weight file; a tensor that is larger has one of its own.

    Raises:
        ConversionError: for a value that there is not, or values that make no sense together.
    """

    source: str | Path
    out: str | Path
    quantization: Quantization | Recipe | str | None = None
    dtype: str | None = None
    dequantize: bool = False
    group_size: int | None = None
    parts: Collection[str] = ()
    layout: str = "mlx"
    split_projections: bool = False
    calibration: CalibrationSettings | str | None = None
    adapter: str | Path | None = None
    tokenizer: str | Path | None = None
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConversionError(f"dtype is {self.dtype!r}; it must be one of {_listed(DTYPES)}.")
        layouts = (*LAYOUTS, *GGUF_TYPES, *ONNX_TYPES)
        if self.layout not in layouts:
            raise ConversionError(
                f"layout is {self.layout!r}; it must be one of {_listed(layouts)}."
            )
        for part in self.parts:
            if part not in PARTS:
                raise ConversionError(f"parts has {part!r}; there is {_listed(PARTS)}.")
        if self.quantization is not None and (self.dequantize or self.layout != "mlx"):
            other = "GGUF" if self.is_gguf else "ONNX" if self.is_onnx else "Hub layout"
            what = "dequantized" if self.dequantize else f"written in {other}"
            raise ConversionError(f"A model is either quantized or {what}.")
        if self.split_projections and self.layout != "hf":
            raise ConversionError(
                "Projections are split in Hub layout alone.",
                hint="Add --export hf, or leave --split-projections out.",
            )
        if self.adapter is not None and self.calibration is not None:
            raise ConversionError(
                "Calibration needs a model's own weights: fuse the adapter first.",
                hint="phimlx fuse --model MODEL --adapter-path ADAPTER --save-path FUSED",
            )
        if self.is_gguf and (self.dtype or self.adapter or self.calibration or self.tokenizer):
            raise ConversionError(
                f"The layout {self.layout} takes neither dtype nor adapter nor calibration nor "
                "tokenizer.",
                hint="Convert to a folder first, and then that folder to GGUF.",
            )
        if isinstance(self.calibration, str):
            object.__setattr__(self, "calibration", CalibrationSettings(self.calibration))

    @property
    def is_gguf(self) -> bool:
        return self.layout in GGUF_TYPES

    @property
    def is_onnx(self) -> bool:
        return self.layout in ONNX_TYPES

    @property
    def out_path(self) -> Path:
        return Path(self.out).absolute()

    @property
    def calibration_settings(self) -> CalibrationSettings | None:
        assert not isinstance(self.calibration, str)  # as a request is made
        return self.calibration


def _listed(names: Collection[str]) -> str:
    return ", ".join(names)
