"""Personas: a system prompt with settings, tools, a model and an adapter, under a name."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phimlx.errors import SettingsError, clipped, shortened
from phimlx.files import is_absent, parse_toml, translate_read_errors
from phimlx.folders import config_folder
from phimlx.preferences.file import READABLE, check_values, read_settings
from phimlx.preferences.keys import ALIAS
from phimlx.preferences.sampling import NonEmpty, Setting

FOLDER = "personas"
SUFFIX = ".toml"
KEYS = {
    **ALIAS,
    "tools": Setting("tools", "--tools", NonEmpty(), "Functions to call."),
    "mcp": Setting("mcp", "--mcp", NonEmpty(), "MCP servers to call.", multiple=True),
}

TEMPLATE = """\
# A persona: phimlx chat --persona {name}

system = "You are …"

# temperature = 0.7
# model = "phi-4-mini"
# adapter = "~/adapters/letters"
# tools = "tools.json"  # beside this file, or a whole path
# mcp = "mcp.json"  # likewise; or a command line, or an address; or a list of these
"""

_NAME = re.compile(r"\w[\w.-]{0,99}")


@dataclass(frozen=True)
class Persona:
    """A persona as its file has it; `values` by keyword."""

    name: str
    path: Path
    values: Mapping[str, Any]

    def get(self, keyword: str) -> Any:
        """Return a value, or None."""
        return self.values.get(keyword)

    @property
    def tools(self) -> Path | None:
        """The file of its tools."""
        named = self.values.get("tools")
        return None if named is None else self.path.parent / Path(named).expanduser()

    @property
    def mcp(self) -> tuple[str, ...]:
        """Its MCP servers: files, command lines and addresses."""
        return tuple(
            str(self.path.parent / Path(each).expanduser()) if each.endswith(".json") else each
            for each in self.values.get("mcp") or ()
        )


def persona_path(name: str) -> Path:
    """Return the path of a persona's file; raises `SettingsError` for what is no name."""
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{shortened(name)} is not a persona's name.",
            hint="Letters, digits, dots and dashes make one.",
        )
    return config_folder() / FOLDER / f"{name}{SUFFIX}"


def list_personas() -> list[str]:
    """List the names of the personas that there are.

    Raises:
        SettingsError: where their folder cannot be read.
    """
    folder = config_folder() / FOLDER
    if is_absent(folder):
        return []
    with translate_read_errors(folder, SettingsError, READABLE):
        paths = [folder / name for name in os.listdir(folder)]
    names = (path.stem for path in paths if path.suffix == SUFFIX)
    return sorted(name for name in names if _NAME.fullmatch(name))


def read_persona(name: str) -> Persona:
    """Read a persona.

    Raises:
        SettingsError: where there is none of that name, which suggests the nearest, or where its
            file does not hold.
    """
    path = persona_path(name)
    if is_absent(path):
        close = difflib.get_close_matches(name, list_personas(), 1)
        make = f"Make it: phimlx persona edit {name}"
        hint = f"Did you mean {close[0]}?" if close else make
        raise SettingsError(f"There is no persona {clipped(name)}.", hint)
    mend = f"Mend it: phimlx persona edit {name}"
    text = read_settings(path, mend)
    try:
        return Persona(name, path, check_values(parse_toml(text), KEYS))
    except SettingsError as error:
        hint = mend if error.hint is None else f"{error.hint} {mend}"
        raise SettingsError(f"{path}: {error}", hint=hint) from None
    except ValueError as error:
        raise SettingsError(f"{path} is not TOML ({error}).", hint=mend) from None
