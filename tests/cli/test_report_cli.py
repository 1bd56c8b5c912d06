"""`phimlx convert --report`: what is shown, what lands beside the model, and wrong usage."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from phimlx.cli.group import cli

TEXT = "The quick brown fox jumps over the lazy dog. What is 3 + 4? " * 6


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)], prog_name="phimlx")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_the_report_lies_beside_the_model(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("nano", "--mlx-path", out, "-q", "--report", "--report-text", text)
    assert result.exit_code == 0
    assert "KL divergence" in result.stdout
    assert "Error of down_proj" in result.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["bits_after"] == pytest.approx(4.5, abs=0.02)
    assert all(0 < layer["error"] < 0.2 for layer in report["layers"])
    card = (out / "README.md").read_text()
    assert card.count("## Quality\n") == 1
    assert "Bits per weight" in card


def test_json_holds_the_report(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("nano", "--mlx-path", out, "--report", "--report-text", text, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["path"] == str(out)
    assert {layer["error"] for layer in found["report"]["layers"]} == {0}


def test_a_missing_chart_does_not_fail_a_conversion(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    result = run("nano", "--mlx-path", out, "--report", "--report-text", text)
    assert result.exit_code == 0
    assert "pip install 'phimlx[plots]'" in result.stderr
    assert (out / "report.json").is_file()
    assert not (out / "report.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nano", "--report-text", "x.txt"], "--report-text goes with --report."),
        (
            ["nano", "--export", "gguf", "--report"],
            "--report reads model folders: leave it out of --export gguf.",
        ),
        (
            ["phi-4", "-q", "--report"],
            "--report compares with the original, and phi-4 is not on this machine: add "
            "--keep-original.",
        ),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    result = run(*arguments, "--mlx-path", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: {message}"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "There is no file {}."),
        (b"\xff\xfe\xfd", "{} is not UTF-8 text."),
    ],
)
def test_a_text_that_cannot_be_read(contents: bytes | None, message: str, tmp_path: Path) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "out"
    if contents is not None:
        file.write_bytes(contents)
    result = run("nano", "--mlx-path", out, "--report", "--report-text", file)
    assert result.exit_code == 1
    assert result.stderr == f"Error: {message.format(file)}\n"
    assert not out.exists()
