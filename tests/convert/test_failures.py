"""What is refused, and what is left behind where a conversion fails: nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from convert import Conversion, Quantization, plan
from convert import convert as convert_model
from phimlx import hub
from phimlx.errors import ConversionError
from tests.convert.tiny import (
    PHI_4,
    failing,
    parameters,
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


def test_quantized_models_are_not_quantized_again(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    convert_model(source, tmp_path / "four", Quantization(32, 4))
    error = failing(tmp_path / "four", tmp_path / "out", Quantization(32, 8))
    assert str(error) == f"{tmp_path}/four is already quantized, to 4 bits."
    assert error.hint == (
        "Convert the original model: what quantization took away does not come back."
    )


def test_groups_that_divide_no_layer(tmp_path: Path) -> None:
    error = failing(write_model(tmp_path / "source"), tmp_path / "out", Quantization(128, 4))
    assert str(error) == "Groups of 128 divide the width of no layer of this model (64, 96)."
    assert error.hint == "Choose a smaller group size."


def test_a_full_disk_is_seen_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "source")
    monkeypatch.setattr(hub, "free_space", lambda folder: 1000)
    error = failing(source, tmp_path / "out")
    assert str(error) == (f"{tmp_path}/out needs 272 kB of disk space, but its disk has 1.00 kB.")
    assert error.hint == "Free some space, or choose a folder on another disk."


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((64, 7), "7 bits in groups of 64 (affine)"),
        ((16, 4), "4 bits in groups of 16 (affine)"),
        ((64, 4, "mxfp4"), "4 bits in groups of 64 (mxfp4)"),
        ((64, 4, "int4"), "4 bits in groups of 64 (int4)"),
    ],
)
def test_quantizations_that_mlx_does_not_have(arguments: tuple[Any, ...], what: str) -> None:
    with pytest.raises(ConversionError) as caught:
        Quantization(*arguments)
    assert str(caught.value) == f"MLX has no quantization to {what}."


def test_unknown_dtypes_and_recipes(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    assert str(failing(source, out, None, "int8")) == (
        "dtype is 'int8'; it must be one of float32, float16, bfloat16."
    )
    assert str(failing(source, out, Quantization(32, 4), None, "mixed")) == (
        "There is no recipe mixed; there is uniform."
    )


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
            "{out} cannot be written: Read-only file system.",
            "Choose a folder that can be written.",
        ),
        (
            errno.EACCES,
            "{out} cannot be written: Permission denied.",
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


KILLED = """
import os, signal, sys
from convert import plan
planned = plan(sys.argv[1], sys.argv[2])
done = []
def advance(nbytes):
    done.append(nbytes)
    if len(done) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
planned.run(advance)
"""


@pytest.mark.parametrize("tensors", [1, 8, 15])
def test_a_killed_run_leaves_no_output_and_the_next_one_none_of_it(
    tmp_path: Path, tensors: int
) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(out), str(tensors)], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    leftover = tmp_path / ".out.partial"
    assert leftover.is_dir()
    (leftover / "deep" / "er").mkdir(parents=True)
    (leftover / "stray.bin").touch()
    convert_model(source, out)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert same_bits(weights_of(out), parameters(PHI_4))


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    first, second = plan(source, out), plan(source, out)
    results: list[Conversion] = []
    errors: list[ConversionError] = []

    def in_between(nbytes: int) -> None:
        if not errors:
            with pytest.raises(ConversionError) as caught:
                second.run()
            errors.append(caught.value)

    results.append(first.run(in_between))
    assert str(errors[0]) == f"{out} is being written by another process."
    assert errors[0].hint == "Wait for it, or stop it."
    assert same_bits(weights_of(out), parameters(PHI_4))
    with pytest.raises(ConversionError, match="exists already"):
        second.run()


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"

    def appear(nbytes: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "precious").touch()

    with pytest.raises(ConversionError) as caught:
        plan(source, out).run(appear)
    assert str(caught.value) == f"{out} cannot be written: Directory not empty."
    assert [path.name for path in out.iterdir()] == ["precious"]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_a_leftover_that_another_process_holds_is_left_alone(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").touch()
    descriptor = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    error = failing(source, out)
    os.close(descriptor)
    assert str(error) == f"{out} is being written by another process."
    assert (tmp_path / ".out.partial" / "half").exists()
