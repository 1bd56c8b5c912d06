"""What `--help` says, held to a transcript, and README's list of commands."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from phimlx.cli.group import COMMANDS, cli
from scripts.help import README, TRANSCRIPT, listed, transcript

WRITE = "what --help says has changed: read it, then run python scripts/help.py"


def test_help_is_as_written_down() -> None:
    assert TRANSCRIPT.read_text(encoding="utf-8") == transcript(), WRITE


@pytest.mark.parametrize("name", COMMANDS)
def test_the_transcript_is_what_a_person_sees(name: str) -> None:
    shown = CliRunner().invoke(cli, [name, "--help"], prog_name="phimlx", terminal_width=100)
    assert shown.exit_code == 0
    assert f"$ phimlx {name} --help\n\n{shown.output}" in transcript()


def test_readme_lists_every_command() -> None:
    readme = README.read_text(encoding="utf-8")
    assert readme == listed(readme), WRITE
    assert re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE) == list(COMMANDS)
