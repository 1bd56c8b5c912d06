#!/usr/bin/env python3
"""Writes down what `--help` says of every command: tests/cli/help.txt and README's list.

    python scripts/help.py

A test compares both with what the commands say now.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from click import Command, Context, Group

from phimlx.cli.group import COMMANDS, cli

ROOT = Path(__file__).parents[1]
TRANSCRIPT, README = ROOT / "tests" / "cli" / "help.txt", ROOT / "README.md"
LIST = re.compile(r"(?<=<!-- commands -->\n).*?(?=<!-- /commands -->)", re.DOTALL)
WIDTH = 100


def transcript() -> str:
    """What `phimlx --help` and each `phimlx COMMAND --help` print, 100 columns wide."""
    root = Context(cli, info_name="phimlx", terminal_width=WIDTH, **cli.context_settings)
    parts = ["$ phimlx --help\n\n" + cli.get_help(root)]
    for name in COMMANDS:
        command = cli.get_command(root, name)
        assert command is not None
        parts += helps(command, root, name)
    return "\n\n\n".join(parts) + "\n"


def helps(command: Command, parent: Context, name: str) -> Iterator[str]:
    """What a command says of itself, and what those within it say."""
    settings = command.context_settings
    context = Context(command, parent, info_name=name, terminal_width=WIDTH, **settings)
    yield f"$ {context.command_path} --help\n\n" + command.get_help(context)
    if isinstance(command, Group):
        for inner, each in command.commands.items():
            yield from helps(each, context, inner)


def listed(readme: str) -> str:
    """README with its list of commands as the table of commands has it."""
    rows = "".join(f"| `{name}` | {line} |\n" for name, (_, line) in COMMANDS.items())
    return LIST.sub("| command | |\n|---|---|\n" + rows, readme)


def main() -> None:
    TRANSCRIPT.write_text(transcript(), encoding="utf-8")
    README.write_text(listed(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
