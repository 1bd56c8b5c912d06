"""Requests for conversions: what is refused before a model is looked at, and what passes."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import convert
from convert import CalibrationSettings, ConversionPlan, ConversionRequest, Quantization
from convert.export.gguf import GgufPlan
from convert.request import LAYOUTS
from phimlx.errors import ConversionError
from tests.convert.tiny import plan, write_model

FOUR = Quantization(32, 4)
LISTED = "mlx, hf, gguf, gguf-q8_0, onnx, onnx-int4"

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float32, float16, bfloat16."),
    ({"layout": "coreml"}, f"layout is 'coreml'; it must be one of {LISTED}."),
    ({"parts": ["eyes"]}, "parts has 'eyes'; there is adapters, encoders."),
    (
        {"quantization": FOUR, "dequantize": True},
        "A model is either quantized or dequantized.",
    ),
    (
        {"quantization": "mixed-4-6", "layout": "hf"},
        "A model is either quantized or written in Hub layout.",
    ),
    (
        {"quantization": FOUR, "layout": "gguf"},
        "A model is either quantized or written in GGUF.",
    ),
    (
        {"adapter": "a", "calibration": "gptq", "quantization": FOUR},
        "Calibration needs a model's own weights: fuse the adapter first.",
    ),
    (
        {"layout": "gguf", "dtype": "float16"},
        "The layout gguf takes neither dtype nor adapter nor calibration nor tokenizer.",
    ),
    (
        {"layout": "gguf-q8_0", "adapter": "a"},
        "The layout gguf-q8_0 takes neither dtype nor adapter nor calibration nor tokenizer.",
    ),
    ({"calibration": "awq"}, "There is no method 'awq'; there is gptq, dwq, sensitivity."),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_refused_before_a_model_is_looked_at(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError) as caught:
        ConversionRequest("nowhere", "out", **settings)
    assert str(caught.value) == message


def test_convert_takes_what_a_request_takes(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    with pytest.raises(TypeError, match="unexpected keyword argument 'recipe'"):
        convert.convert(source, tmp_path / "out", recipe=FOUR)
    for number, settings in enumerate(
        [{"group_size": 32, "quantization": "mixed-4-6"}, {"shard_bytes": 1 << 16}]
    ):
        made = convert.convert(source, tmp_path / str(number), **settings)
        assert made.path == tmp_path / str(number)


@pytest.mark.parametrize("layout", [*LAYOUTS, "gguf"])
def test_one_request_has_one_plan(tmp_path: Path, layout: str) -> None:
    if layout == "gguf":
        pytest.importorskip("gguf", reason="gguf is not installed: pip install 'phimlx[gguf]'")
        with pytest.raises(ConversionError, match=r"no tokenizer\.json"):
            plan(write_model(tmp_path / "source"), tmp_path / "out", layout=layout)
        return
    planned = plan(write_model(tmp_path / "source"), tmp_path / "out", layout=layout)
    assert isinstance(planned, ConversionPlan)
    assert planned.request.layout == layout
    assert GgufPlan.calibration is None


def test_a_request_stays_the_same_for_another_source() -> None:
    """As where the folder is known only when the first file has come."""
    settings = CalibrationSettings("gptq", samples=8)
    request = ConversionRequest("a", "out", FOUR, calibration=settings, group_size=64)
    moved = replace(request, source=Path("b"))
    same = {each.name for each in fields(request) if each.name != "source"}
    assert all(getattr(request, name) == getattr(moved, name) for name in same)
    assert moved.calibration_settings is settings
    assert ConversionRequest("a", "out", calibration="dwq").calibration_settings == (
        CalibrationSettings("dwq")
    )
