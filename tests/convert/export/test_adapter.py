"""Adapters in another format: whole or not at all, on a full disk and two at once."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from convert import CalibrationSettings, Quantization
from convert.export import adapter as module
from convert.export.adapter import WRITERS, export_adapter
from convert.folder import partial_folder
from phimlx.adapters.read import read_adapter
from phimlx.cli.group import cli
from phimlx.errors import ConversionError, PhimlxError
from tests.convert.quantize.test_calibrated import tiny
from tests.convert.test_fuse import SETTINGS, adapter_for
from tests.convert.tiny import plan, write_model


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Make the system refuse to write more to any one file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return adapter_for(write_model(tmp_path / "m"), tmp_path / "a", SETTINGS["lora"])


@pytest.mark.parametrize("format", WRITERS)
def test_a_disk_that_is_full_leaves_nothing(adapter: Path, tmp_path: Path, format: str) -> None:
    before = sorted(tmp_path.iterdir())
    out, failures = tmp_path / "out", 0
    for limit in (0, 1, 100, 1_000, 5_000, 10_000, 40_000):
        message = None
        with files_of_at_most(limit):
            try:
                export_adapter(adapter, out, format)
            except PhimlxError as error:
                message = str(error)
        if message is None:
            break
        failures += 1
        assert "The disk is full: " in message
        assert sorted(tmp_path.iterdir()) == before
    assert failures >= 4
    layers = [read_adapter(folder).layers for folder in (adapter, out)]
    assert layers[0].keys() == layers[1].keys()
    for path, layer in layers[0].items():
        assert mx.allclose(layer.delta(), layers[1][path].delta())


@pytest.mark.parametrize("format", WRITERS)
def test_the_command_on_a_full_disk(adapter: Path, tmp_path: Path, format: str) -> None:
    arguments = ["fuse", "--adapter-path", str(adapter), "--save-path", str(tmp_path / "out")]
    with files_of_at_most(3_000):
        result = CliRunner().invoke(cli, [*arguments, "--export", format], prog_name="phimlx")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: The disk is full: ")
    assert {path.name for path in tmp_path.iterdir()} == {"m", "a"}
    assert CliRunner().invoke(cli, [*arguments, "--export", format]).exit_code == 0


def test_two_at_once_do_not_mix(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, errors = tmp_path / "out", []
    write = WRITERS["peft"]

    def in_between(folder: Path, found: object) -> None:
        with pytest.raises(ConversionError) as caught:
            export_adapter(adapter, out, "mlx-lm")
        errors.append(str(caught.value))
        write(folder, found)

    monkeypatch.setitem(module.WRITERS, "peft", in_between)
    export_adapter(adapter, out, "peft")
    assert errors == [f"{out} is being written by another process."]
    assert {file.name for file in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    with pytest.raises(ConversionError, match="exists already"):
        export_adapter(adapter, out, "mlx-lm")


KILLED = """
import os, signal, sys
from pathlib import Path
from convert.export import adapter
write = adapter.WRITERS[sys.argv[3]]
def killed(folder, found):
    write(folder, found)
    os.kill(os.getpid(), signal.SIGKILL)
adapter.WRITERS[sys.argv[3]] = killed
adapter.export_adapter(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


@pytest.mark.parametrize("format", WRITERS)
def test_a_killed_export_leaves_no_output_and_does_not_hinder_the_next(
    adapter: Path, tmp_path: Path, format: str
) -> None:
    out = tmp_path / "out"
    arguments = [str(adapter), str(out), format]
    ended = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    assert partial_folder(out).is_dir()
    export_adapter(adapter, out, format)
    assert {path.name for path in tmp_path.iterdir()} == {"m", "a", "out"}
    export_adapter(adapter, tmp_path / "other", format)
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


@pytest.mark.parametrize("limit", [0, 30_000, 100_000])
def test_calibration_on_a_full_disk(tmp_path: Path, limit: int) -> None:
    source, out = tiny(tmp_path / "source"), tmp_path / "out"
    settings = CalibrationSettings("gptq", samples=8, length=32)
    planned = plan(source, out, Quantization(32, 4), calibration=settings)
    with files_of_at_most(limit), pytest.raises(ConversionError) as caught:
        planned.run()
    assert str(caught.value) == f"The disk is full: {out} could not be written."
    assert caught.value.hint == "Free some space, or choose a folder on another disk."
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
