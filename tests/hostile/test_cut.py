"""Weights that are cut short when their header has been read and they have not."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

import phimlx
from phimlx.cli.group import cli
from phimlx.errors import CheckpointError
from tests.convert.test_fuse import SETTINGS, adapter_for
from tests.training.folder import write_rows, write_tiny

SAID = "Error: A file of weights cannot be read to its end: it was changed while it was read.\n"
GENERATE = ("generate", "--model", "model", "--prompt", "Hi", "-m", "2")
ADAPTED = ("--adapter-path", "adapter")
COMMANDS = {
    "generate": ("model.safetensors", GENERATE),
    "an adapter": ("adapters.safetensors", (*GENERATE, *ADAPTED)),
    "train": (
        "model.safetensors",
        ("train", "--model", "model", "--data", "d.jsonl", "--adapter-path", "o"),
    ),
    "evaluate": ("model.safetensors", ("evaluate", "--model", "model", "--data", "d.jsonl")),
    "gptq": (
        "model.safetensors",
        (
            *("convert", "model", "--mlx-path", "o", "-q", "--q-group-size", "32"),
            *("--q-method", "gptq", "--calibration", "d.txt"),
        ),
    ),
    "fuse": ("adapters.safetensors", ("fuse", *ADAPTED, "--save-path", "o", "--export", "peft")),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    adapter_for(write_tiny(tmp_path / "model"), tmp_path / "adapter", SETTINGS["lora"])
    write_rows(tmp_path / "d.jsonl", 6)
    (tmp_path / "d.txt").write_text("Some words to calibrate on. " * 2000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cutting(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Cut files of that name as soon as MLX has read their headers."""
    load = mx.load

    def cut(file: str, *rest: object, **more: object) -> object:
        found = load(file, *rest, **more)  # type: ignore[call-overload]
        if os.path.basename(file) == name:
            os.truncate(file, os.path.getsize(file) // 2)
        return found

    monkeypatch.setattr(mx, "load", cut)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    file, command = COMMANDS[name]
    cutting(monkeypatch, file)
    result = CliRunner().invoke(cli, command, prog_name="phimlx")
    assert result.exit_code == 1
    assert SAID in result.stderr
    assert not [path for path in (folder / "o").glob("*") if path.name != "log.jsonl"]


def test_from_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cutting(monkeypatch, "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read to its end"):
        phimlx.load(folder / "model")
