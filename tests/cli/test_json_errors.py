"""Errors under `--json`: one object on stdout that says what is wrong, and the same exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from phimlx.cli.group import COMMANDS, cli
from tests.test_imports import HOME


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="phimlx")


def with_json() -> list[str]:
    """Every command that has --json, those within commands too."""
    root = click.Context(cli)
    found = []
    for name in COMMANDS:
        command = cli.get_command(root, name)
        assert command is not None
        inner = command.commands if isinstance(command, click.Group) else {}
        for words, each in ((name, command), *((f"{name} {n}", c) for n, c in inner.items())):
            if any(parameter.name == "as_json" for parameter in each.params):
                found.append(words)
    return found


FAILING = [
    "show nope",
    "download nope",
    "remove nope -y",
    "generate --model nope hi",
    "generate --image gone.png hi",
    "generate --prompts gone --output out",
    "extract gone.txt --model nope --schema a -o out",
    "transcribe --model nope {file}",
    "convert nope --mlx-path out",
    "train --model nope --data gone",
    "fuse --model nano --adapter-path gone --save-path out",
    "evaluate --model nope --data gone",
    "bench --model nope",
    "history show 99",
    "persona show nope",
]


@pytest.mark.parametrize("line", FAILING)
def test_an_error_is_the_one_object(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sound.wav").write_bytes(b"x")
    words = line.format(file="sound.wav").split()
    plain, told = run(*words), run(*words, "--json")
    error = json.loads(told.stdout)["error"]
    assert told.exit_code == plain.exit_code == 1
    assert f"Error: {error['message']}\n" in plain.stderr
    assert (f"Hint: {error['hint']}\n" in plain.stderr) == (error["hint"] is not None)
    assert told.stderr == plain.stderr


@pytest.mark.parametrize("words", with_json())
def test_wrong_usage_is_one_too(words: str) -> None:
    told = run(*words.split(), "--json", "--no-such-flag")
    assert told.exit_code == 2
    error = json.loads(told.stdout)["error"]
    assert error["message"].startswith("No such option '--no-such-flag'.")
    assert told.stderr.endswith(f"Error: {error['message']}\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("line", ["show nope --json", "list --json --nope", "doctor", "list"])
def test_an_error_that_cannot_be_written_is_one_sentence(line: str) -> None:
    with open("/dev/full", "w") as full:
        done: Any = subprocess.run(
            [sys.executable, "-m", "phimlx", *line.split()],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=HOME, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.endswith("Error: stdout cannot be written: No space left on device.\n")
    assert "Traceback" not in done.stderr
