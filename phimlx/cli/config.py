"""`phimlx config`: the file of settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.options import json_option
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.preferences.file import Preferences


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Show the settings of the user's own, and where each comes from; or change them.

    They lie in config.toml in the user's folder of settings, or in PHIMLX_CONFIG_DIR. A flag comes
    first, then a variable such as PHIMLX_MODEL or PHIMLX_TEMPERATURE, then the file, then the
    catalogue.

    \b
      phimlx config set model phi-4-mini
      phimlx config set models.phi-4.temperature 0.8
      phimlx config set alias.work ~/models/mine
      phimlx config set alias.work.adapter ~/adapters/letters
    """
    if context.invoked_subcommand is None:
        show(Output(json=as_json))


@command.command("set")
@click.argument("name", metavar="SETTING")
@click.argument("value", metavar="VALUE")
@json_option
def set_command(name: str, value: str, as_json: bool) -> None:
    """Set SETTING, such as temperature, models.phi-4.system or alias.work, to VALUE."""
    from phimlx.preferences.edit import set_value
    from phimlx.preferences.file import config_path

    output, path = Output(json=as_json), config_path()
    found = set_value(path, name, value)
    output.json({"name": name, "value": found, "path": str(path)})
    output.text(f"{name} = {literal(found)}  in {path}")


@command.command("unset")
@click.argument("name", metavar="SETTING")
@json_option
def unset_command(name: str, as_json: bool) -> None:
    """Take SETTING out of the file: a setting, or all of models.phi-4 or alias.work."""
    from phimlx.preferences.edit import unset_value
    from phimlx.preferences.file import config_path

    output, path = Output(json=as_json), config_path()
    gone = unset_value(path, name)
    output.json({"name": name, "was_set": gone, "path": str(path)})
    output.text(f"{name} is no longer set in {path}." if gone else f"{name} was not set.")


@command.command("edit")
@json_option
def edit_command(as_json: bool) -> None:
    """Open the file in $EDITOR, and look afterwards whether it holds."""
    from phimlx.preferences.edit import TEMPLATE
    from phimlx.preferences.file import config_path, read_preferences

    output, path = Output(json=as_json), config_path()
    edit_file(path, TEMPLATE)
    read_preferences()
    output.json({"path": str(path)})
    output.text(f"{path} holds.")


def edit_file(path: Path, template: str) -> None:
    """Open a file in $EDITOR, made of a template where it is not there."""
    from phimlx.errors import SettingsError
    from phimlx.files import translate_write_errors, write_file
    from phimlx.preferences.file import WRITABLE

    with translate_write_errors(path, SettingsError, WRITABLE):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            write_file(path, template, private=True)
    try:
        click.edit(filename=str(path))
    except click.ClickException as error:
        raise SettingsError(
            f"The editor could not be used: {error.message}", hint="Set EDITOR to another one."
        ) from None


def show(output: Output) -> None:
    """Show the path and the values that count."""
    from phimlx.files import is_absent
    from phimlx.preferences.file import read_preferences

    found = read_preferences()
    there = not is_absent(found.path)
    rows = [(name, literal(value), source) for name, value, source in listed(found)]
    output.json(
        {
            "path": str(found.path),
            "exists": there,
            "settings": [
                {"name": name, "value": value, "source": source}
                for name, value, source in listed(found)
            ],
        }
    )
    output.text(f"{found.path}{'' if there else ', which is not there yet'}")
    if rows:
        output.text()
        output.table(["setting", "value", "from"], rows)


def listed(found: Preferences) -> list[tuple[str, Any, str]]:
    """List the values that count, by name, and where each comes from."""
    from phimlx.preferences.keys import TOP, spelled

    tops = ((keyword, found.value(keyword)) for keyword in TOP)
    rows = [(spelled(key), value.value, value.source) for key, value in tops if value is not None]
    for table, sections in (("models", found.models), ("alias", found.alias)):
        for row, values in sections.items():
            rows += [
                (f"{table}.{row}.{spelled(key)}", value, str(found.path))
                for key, value in values.items()
            ]
    return rows


def literal(value: Any) -> str:
    """Write a value as TOML has it."""
    from phimlx.terminal.output import encode_json

    return encode_json(list(value) if isinstance(value, tuple) else value)
