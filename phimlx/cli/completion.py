"""`phimlx completion`: names, files and settings at a press of Tab."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import click

from phimlx.cli.options import json_option
from phimlx.terminal.output import Output

SHELLS = ("bash", "zsh", "fish")

# zsh completes nothing before compinit has run, which some set-ups leave out.
BEFORE = {"zsh": "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }\n"}


@click.command()
@click.argument("shell", metavar="[bash|zsh|fish]", type=click.Choice(SHELLS), required=False)
@click.option("--install", is_flag=True, help="Put it in place, for every shell from now on.")
@json_option
def command(shell: str | None, install: bool, as_json: bool) -> None:
    """Print what lets a shell complete commands, flags, files, models and settings.

    Without a name it is for your shell, as SHELL says.

    \b
      phimlx completion --install         from the next shell on
      eval "$(phimlx completion zsh)"     in this shell alone
    """
    shell = shell or usual_shell()
    output = Output(json=as_json)
    if not install:
        output.json({"shell": shell, "script": script(shell)})
        output.text(script(shell).rstrip("\n"))
        return
    written = put_in_place(shell)
    output.json({"shell": shell, "written": list(map(str, written))})
    for path in written:
        output.text(f"Wrote {path}.")
    output.note(f"It works in the next {shell} that you open.")


def usual_shell() -> str:
    """Return the user's shell; raises `click.UsageError` where it is none of those known."""
    name = Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise click.UsageError(f"Which shell is it for? Name one: {', '.join(SHELLS)}.")
    return name


def script(shell: str) -> str:
    """Write the functions of a shell that ask phimlx for what completes a word."""
    from click.shell_completion import get_completion_class

    from phimlx.cli.group import COMPLETING, cli

    kind = get_completion_class(shell)
    assert kind is not None  # one of SHELLS
    asks = kind(cli, {}, "phimlx", COMPLETING)
    return BEFORE.get(shell, "") + asks.source_template % asks.source_vars()


def put_in_place(shell: str) -> list[Path]:
    """Write a shell's script where it is read; return the files that were written.

    fish reads its folder. Of bash and zsh a line at the end of the user's own file reads the
    script; it is written once.

    Raises:
        SettingsError: where a file cannot be read or written.
    """
    from phimlx.errors import SettingsError
    from phimlx.files import read_text, translate_write_errors, write_file
    from phimlx.folders import data_folder

    if shell == "fish":
        path = _configured("XDG_CONFIG_HOME", ".config") / "fish" / "completions" / "phimlx.fish"
    else:
        path = data_folder() / f"completion.{shell}"
    with translate_write_errors(path, SettingsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, script(shell))
    if shell == "fish":
        return [path]
    own = start_file(shell)
    quoted = shlex.quote(str(path))
    line = f"[ -r {quoted} ] && . {quoted}  # completion of phimlx"
    before = read_text(own, SettingsError, limit=16_000_000) if own.exists() else ""
    if line in before.split("\n"):
        return [path]
    with translate_write_errors(own, SettingsError), own.open("a", encoding="utf-8") as file:
        file.write(("\n" if before and not before.endswith("\n") else "") + line + "\n")
    return [path, own]


def start_file(shell: str) -> Path:
    """Return the file that a shell reads when it begins to talk with its user."""
    if shell == "zsh":
        return _configured("ZDOTDIR", "") / ".zshrc"
    # Terminals of macOS open login shells, of which bash reads another file.
    return Path.home() / (".bash_profile" if sys.platform == "darwin" else ".bashrc")


def _configured(variable: str, usual: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / usual)
