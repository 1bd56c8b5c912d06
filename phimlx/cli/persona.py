"""`phimlx persona`: named system prompts with settings, tools, a model and an adapter."""

from __future__ import annotations

import click

from phimlx.cli.config import literal
from phimlx.cli.options import json_option
from phimlx.terminal.output import Output


@click.group()
def command() -> None:
    """List, show or edit personas: named system prompts with settings, tools, model and adapter.

    Each is a file NAME.toml in the folder personas beside config.toml, with the keys of a model's
    section there, tools, a JSON file, and mcp, servers as of chat --mcp. chat and generate take one
    by --persona, a chat also by /persona.
    """


@command.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List personas."""
    from phimlx.errors import SettingsError
    from phimlx.preferences.personas import list_personas, persona_path, read_persona

    output = Output(json=as_json)
    rows = []
    for name in list_personas():
        try:
            rows.append((name, " ".join((read_persona(name).get("system") or "").split())[:60]))
        except SettingsError as error:
            output.warning(str(error))
    output.json(
        {
            "personas": [
                {"name": name, "path": str(persona_path(name)), "system": system}
                for name, system in rows
            ]
        }
    )
    if rows:
        output.table(["persona", "system prompt"], rows)
    else:
        output.text("There is no persona yet. Make one: phimlx persona edit NAME")


@command.command("show")
@click.argument("name", metavar="PERSONA")
@json_option
def show_command(name: str, as_json: bool) -> None:
    """Show a persona."""
    from phimlx.preferences.keys import spelled
    from phimlx.preferences.personas import read_persona

    output = Output(json=as_json)
    persona = read_persona(name)
    output.json({"name": name, "path": str(persona.path), **persona.values})
    output.text(f"{name}  {persona.path}")
    for key, value in persona.values.items():
        output.text(f"{spelled(key)} = {literal(value)}")


@command.command("edit")
@click.argument("name", metavar="PERSONA")
@json_option
def edit_command(name: str, as_json: bool) -> None:
    """Open a persona's file in $EDITOR, made where it is not there; look whether it holds."""
    from phimlx.cli.config import edit_file
    from phimlx.preferences.personas import TEMPLATE, persona_path, read_persona

    output, path = Output(json=as_json), persona_path(name)
    edit_file(path, TEMPLATE.format(name=name))
    read_persona(name)
    output.json({"name": name, "path": str(path)})
    output.text(f"{path} holds.")
