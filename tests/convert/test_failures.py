"""What is refused, and what is left behind where a conversion fails: nothing."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from convert import Quantization
from convert import convert as convert_model
from convert import plan as plan_module
from phimlx.errors import CheckpointError, ConversionError
from phimlx.hub import transfer
from tests.convert.tiny import (
    PHI_4,
    failing,
    parameters,
    plan,
    same_bits,
    weights_of,
    write_model,
)

# Refusals, before anything is written


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("precious")
    else:
        out.symlink_to("nowhere")
    error = failing(source, out)
    assert str(error) == f"{out} exists already."
    assert error.hint == "Choose another folder, or remove it first."


def test_quantized_models_do_not_grow(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    convert_model(source, tmp_path / "four", Quantization(32, 4))
    for bits in (4, 8):
        error = failing(tmp_path / "four", tmp_path / "out", Quantization(32, bits))
        assert str(error) == (
            f"{tmp_path}/four is already quantized, to 4 bits: this would make it no smaller, and "
            "no better."
        )
        assert error.hint == (
            "Choose fewer bits, or convert the original model: what quantization took away does "
            "not come back."
        )


def test_quantized_models_without_a_purpose(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    convert_model(source, tmp_path / "four", Quantization(32, 4))
    for layout in ("mlx", "hf"):
        error = failing(tmp_path / "four", tmp_path / "out", layout=layout)
        assert str(error) == f"{tmp_path}/four is already quantized, to 4 bits."
        assert error.hint == (
            "Quantize it further with -q, or make it unquantized with --dequantize."
        )


def test_plain_models_are_not_dequantized(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    error = failing(source, tmp_path / "out", dequantize=True)
    assert str(error) == f"{source} is not quantized, so there is nothing to dequantize."
    assert error.hint == "Leave --dequantize out."


def test_purposes_that_contradict_each_other(tmp_path: Path) -> None:
    source, four = write_model(tmp_path / "source"), Quantization(32, 4)
    assert str(failing(source, tmp_path / "out", four, dequantize=True)) == (
        "A model is either quantized or dequantized."
    )
    assert str(failing(source, tmp_path / "out", four, layout="hf")) == (
        "A model is either quantized or written in Hub layout."
    )


def test_groups_that_divide_no_layer(tmp_path: Path) -> None:
    error = failing(write_model(tmp_path / "source"), tmp_path / "out", Quantization(128, 4))
    assert str(error) == "Groups of 128 divide the width of no layer of this model (64, 96)."
    assert error.hint == "Choose a smaller group size."


def test_a_full_disk_is_seen_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "source")
    monkeypatch.setattr(transfer, "free_space", lambda folder: 1000)
    error = failing(source, tmp_path / "out")
    assert str(error) == (f"{tmp_path}/out needs 272 kB of disk space, but its disk has 1.00 kB.")
    assert error.hint == "Free some space, or choose a folder on another disk."


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            (64, 7),
            "MLX has no affine quantization to 7 bits in groups of 64.",
            "affine has 2 or 3 or 4 or 5 or 6 or 8 bits in groups of 32 or 64 or 128.",
        ),
        (
            (16, 4),
            "MLX has no affine quantization to 4 bits in groups of 16.",
            "affine has 2 or 3 or 4 or 5 or 6 or 8 bits in groups of 32 or 64 or 128.",
        ),
        (
            (64, 4, "mxfp4"),
            "MLX has no mxfp4 quantization to 4 bits in groups of 64.",
            "mxfp4 has 4 bits in groups of 32.",
        ),
        (
            (64, 4, "int4"),
            "MLX has no quantization int4; it has affine, mxfp4, mxfp8, nvfp4.",
            None,
        ),
    ],
)
def test_quantizations_that_mlx_does_not_have(
    arguments: tuple[Any, ...], message: str, hint: str | None
) -> None:
    with pytest.raises(ConversionError) as caught:
        Quantization(*arguments)
    assert (str(caught.value), caught.value.hint) == (message, hint)


def test_unknown_dtypes_and_recipes(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    assert str(failing(source, out, None, "int8")) == (
        "dtype is 'int8'; it must be one of float32, float16, bfloat16."
    )
    error = failing(source, out, "mixed")
    assert str(error) == (
        "There is no recipe 'mixed' for phi3 models; there is mixed-3-5, mixed-4-5, mixed-4-6, "
        "mixed-6-8."
    )
    assert error.hint == "A recipe of your own is a file whose name ends in .toml."


# Failures on the way


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_weights_that_are_not_finite(tmp_path: Path, dtype: mx.Dtype, value: float) -> None:
    weights = parameters(PHI_4, dtype)
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][3, 5] = value
    source = write_model(tmp_path / "source", PHI_4, weights)
    error = failing(source, tmp_path / "out", Quantization(32, 4))
    assert str(error) == f"{name} holds NaN or infinity: this model is damaged."
    assert error.hint == "Download it again."


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_too_large_for_the_dtype(tmp_path: Path, sign: int) -> None:
    weights = parameters(PHI_4)
    weights["lm_head.weight"][0, 0] = sign * 1e6
    source = write_model(tmp_path / "source", PHI_4, weights)
    error = failing(source, tmp_path / "out", None, "float16")
    assert str(error) == "lm_head.weight holds numbers too large for float16."
    assert error.hint == "Choose bfloat16 or float32."
    convert_model(source, tmp_path / "out", None, "bfloat16")


def test_scales_too_large_for_the_dtype(tmp_path: Path) -> None:
    """Weights of 2 bits span three scales, which float16 may hold each and not together."""
    weights = parameters(PHI_4, mx.float16)
    weights["lm_head.weight"][0, 0] = 65504
    weights["lm_head.weight"][0, 1] = -65504
    weights["lm_head.weight"][0, 32] = 65504
    source = write_model(tmp_path / "source", PHI_4, weights)
    convert_model(source, tmp_path / "eight", Quantization(32, 8))
    assert all(mx.all(mx.isfinite(a)) for a in weights_of(tmp_path / "eight").values())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_largest_numbers_are_finite(tmp_path: Path, dtype: mx.Dtype, sign: int) -> None:
    weights = parameters(PHI_4, dtype)
    weights["lm_head.weight"][0, 0] = sign * mx.finfo(dtype).max
    convert_model(write_model(tmp_path / "source", PHI_4, weights), tmp_path / "out")
    assert same_bits(weights_of(tmp_path / "out"), weights)


def stopping(error: BaseException) -> Any:
    def advance(nbytes: int) -> None:
        raise error

    return advance


def test_damage_in_a_later_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "BATCH_BYTES", 4096)
    weights = parameters(PHI_4)
    weights["model.embed_tokens.weight"][-1, -1] = float("nan")
    source = write_model(tmp_path / "source", PHI_4, weights)
    error = failing(source, tmp_path / "out", Quantization(32, 4))
    assert str(error) == ("model.embed_tokens.weight holds NaN or infinity: this model is damaged.")


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_scales_that_are_not_finite(tmp_path: Path, part: str) -> None:
    convert_model(write_model(tmp_path / "source"), tmp_path / "eight", Quantization(32, 8))
    weights = weights_of(tmp_path / "eight")
    weights[f"model.layers.0.mlp.down_proj.{part}"][7, 1] = float("inf")
    mx.eval(weights)
    config = json.loads((tmp_path / "eight" / "config.json").read_text())
    damaged = write_model(tmp_path / "damaged", config, weights)
    for arguments in ({"quantization": Quantization(32, 4)}, {"dequantize": True}):
        error = failing(damaged, tmp_path / "out", **arguments)
        assert str(error) == (
            "model.layers.0.mlp.down_proj.weight holds NaN or infinity: this model is damaged."
        )


def test_a_source_that_is_cut_short_meanwhile(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    planned = plan(source, out)
    os.truncate(source / "model.safetensors", 100_000)
    with pytest.raises(CheckpointError) as caught:
        planned.run()
    assert re.fullmatch(
        r"model\.safetensors ends within [\w.]+: it was changed while it was read\.",
        str(caught.value),
    )
    assert caught.value.hint == "Download or convert the model again."
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    planned = plan(write_model(tmp_path / "source"), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        planned.run(stopping(KeyboardInterrupt()))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("number", "message", "hint"),
    [
        (
            errno.ENOSPC,
            "The disk is full: {out} could not be written.",
            "Free some space, or choose a folder on another disk.",
        ),
        (
            errno.EDQUOT,
            "The disk is full: {out} could not be written.",
            "Free some space, or choose a folder on another disk.",
        ),
        (
            errno.EROFS,
            "{out} cannot be written: read-only file system.",
            "Choose a folder that can be written.",
        ),
        (
            errno.EACCES,
            "{out} cannot be written: permission denied.",
            "Choose a folder that can be written.",
        ),
    ],
)
def test_a_disk_that_refuses(tmp_path: Path, number: int, message: str, hint: str) -> None:
    out = tmp_path / "out"
    planned = plan(write_model(tmp_path / "source"), out)
    with pytest.raises(ConversionError) as caught:
        planned.run(stopping(OSError(number, os.strerror(number))))
    assert str(caught.value) == message.format(out=out)
    assert caught.value.hint == hint
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_parent_that_is_no_folder(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    (tmp_path / "file").touch()
    error = failing(source, tmp_path / "file" / "out")
    assert str(error) == f"{tmp_path}/file/out cannot be written: {tmp_path}/file is not a folder."


def test_missing_parents_are_made(tmp_path: Path) -> None:
    convert_model(write_model(tmp_path / "source"), tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / "config.json").is_file()
