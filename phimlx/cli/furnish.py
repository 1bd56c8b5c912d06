"""A conversation furnished with what flags, a persona and the user's settings say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.conversations import lasting_name, model_name
from phimlx.cli.preferences import preferences
from phimlx.preferences.sampling import SETTINGS, given

if TYPE_CHECKING:
    from phimlx.preferences.personas import Persona
    from phimlx.terminal.conversation import Conversation

SAMPLING = {setting.keyword for setting in SETTINGS}

persona_option = click.option(
    "--persona", metavar="PERSONA", help="Begin as a persona: see phimlx persona."
)


@dataclass(frozen=True)
class Flags:
    """What was given on the command line; None for what was not.

    Attributes:
        usual_model: the model where neither a flag, a persona nor a saved conversation names one.
    """

    model: str | None = None
    persona: str | None = None
    adapter: str | None = None
    system: str | None = None
    tools_file: Path | None = None
    kv_bits: int | None = None
    usual_model: str | None = None
    mcp: tuple[str, ...] = ()


@dataclass(frozen=True)
class Furnished:
    """A conversation that may begin, and what the model is loaded with."""

    conversation: Conversation
    model: str | None
    adapter: str | None
    kv_bits: int | None
    mcp: tuple[str, ...] = ()


def furnish(flags: Flags, settings: dict[str, Any], saved: Conversation | None) -> Furnished:
    """Put together what a conversation begins with.

    A flag comes first, then a persona, then what a saved conversation holds, or for a new one the
    environment and the user's file.

    Raises:
        SettingsError: for a persona or settings that do not hold.
        PromptError: for tools that are none.
    """
    from phimlx.prompt.tools import load_tools
    from phimlx.terminal.conversation import Conversation

    persona = read(flags.persona)
    named = flags.model or persona.get("model")
    choice = preferences().choose(named or (None if saved else flags.usual_model))
    if saved is None:
        conversation = Conversation("", settings=_sampling(choice.get))
        conversation.system = choice.get("system")
    else:
        conversation = saved
    unchanged = saved is not None and named is None
    model = conversation.model if unchanged else choice.model
    adapter = conversation.adapter if unchanged else choice.get("adapter")
    conversation.wear(persona)
    conversation.settings |= given(settings)
    if flags.system is not None:
        conversation.system = flags.system
    if flags.tools_file is not None:
        conversation.tools = load_tools(flags.tools_file)
    adapter = flags.adapter or persona.get("adapter") or adapter
    conversation.model = model_name(model)
    conversation.adapter = None if adapter is None else lasting_name(adapter)
    kv_bits = flags.kv_bits or persona.get("kv_bits") or choice.get("kv_bits")
    return Furnished(conversation, model, adapter, kv_bits, flags.mcp or persona.mcp)


def read(name: str | None) -> Persona:
    """Read a persona; one without values where none is named."""
    from phimlx.preferences.personas import Persona, read_persona

    return Persona("", Path(), {}) if name is None else read_persona(name)


def _sampling(get: Any) -> dict[str, Any]:
    return given({keyword: get(keyword) for keyword in SAMPLING})
