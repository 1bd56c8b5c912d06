"""`phimlx download`: what is printed, and how errors end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from phimlx import hub
from phimlx.cli.group import COMMANDS, cli


@pytest.fixture(autouse=True)
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 2100 bytes that every download ends with."""
    monkeypatch.setitem(COMMANDS, "download", ("phimlx.cli.download", ""))
    (tmp_path / "config.json").write_bytes(bytes(100))
    (tmp_path / "model.safetensors").write_bytes(bytes(2000))
    asked: list[tuple[str, str | None]] = []

    def download(source: str, revision: str | None = None) -> Path:
        asked.append((source, revision))
        assert asked == [("phi-4-mini", "v1")]
        return tmp_path

    monkeypatch.setattr(hub, "download", download)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["download", *arguments], prog_name="phimlx")


def test_what_a_person_reads(downloaded: Path) -> None:
    result = run("phi-4-mini", "--revision", "v1")
    assert result.exit_code == 0
    assert result.stdout == f"{downloaded}: 2.10 kB\n"
    assert result.stderr == "Try it: phimlx chat --model phi-4-mini\n"


def test_json(downloaded: Path) -> None:
    result = run("phi-4-mini", "--revision", "v1", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "model": "phi-4-mini",
        "path": str(downloaded),
        "bytes": 2100,
    }
    assert result.stderr == ""


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(COMMANDS, "download", ("phimlx.cli.download", ""))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    result = run("phi-4-mini")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        "Error: The Hub cannot be reached at http://127.0.0.1:1.\n"
        "Hint: Check the network, then run it again.\n"
    )


def test_no_model() -> None:
    result = run()
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: Missing argument 'MODEL'.\n")
