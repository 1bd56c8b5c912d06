#!/usr/bin/env python3
"""Writes down what `--help` says of every command, and README's tables of commands and models.

    python scripts/help.py

A test compares them with what the commands and the catalogue say now.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from click import Command, Context, Group

from phimlx import catalog
from phimlx.cli.group import COMMANDS, cli
from phimlx.machine.memory import cache_bytes
from phimlx.models import registry
from phimlx.sizes import size_text

ROOT = Path(__file__).parents[1]
TRANSCRIPT, README = ROOT / "tests" / "cli" / "help.txt", ROOT / "README.md"
LIST = re.compile(r"(?<=<!-- commands -->\n).*?(?=<!-- /commands -->)", re.DOTALL)
FAMILY = re.compile(r"(?<=<!-- family -->\n).*?(?=<!-- /family -->)", re.DOTALL)
MACS = (8, 16, 24, 32, 48, 64)  # gigabytes
SHARE = 0.6  # of them, which Metal lets a model have on every Mac
CONTEXT = 4096
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
    readme = LIST.sub("| command | |\n|---|---|\n" + rows, readme)
    return FAMILY.sub("".join(family()), readme)


def family() -> Iterator[str]:
    """The lines of README's table of models, from the catalogue and the records."""
    yield "| model | takes | 4 bits | Mac | licence | to have it |\n|---|---|---|---|---|---|\n"
    for model in catalog.FAMILY:
        if model.repo is None:
            continue
        architecture = registry.find(model.architecture)
        assert architecture is not None
        weights = model.quantized_nbytes
        needed = weights + cache_bytes(model, min(CONTEXT, model.context_length))
        mac = next(gigabytes for gigabytes in MACS if needed <= SHARE * gigabytes * 10**9)
        command = (
            f"phimlx download {model.alias}"
            if model.quantized_repo
            else f"phimlx convert {model.alias} --mlx-path {model.alias}-4bit -q"
        )
        yield (
            f"| `{model.alias}` | {', '.join(architecture.takes)} | {size_text(weights)} "
            f"| {mac} GB | {model.licence} | `{command}` |\n"
        )


def main() -> None:
    TRANSCRIPT.write_text(transcript(), encoding="utf-8")
    README.write_text(listed(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
