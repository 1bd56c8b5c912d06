"""What a command takes from the user's file of settings and environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from phimlx.preferences.file import Preferences

PREPARED = "_begins_with_preferences"
READ = "phimlx.preferences"
"""Where the context's `meta` holds what was read for this run."""


def preferences() -> Preferences:
    """Return what the user prefers, read once in a run.

    Raises `SettingsError` for a file or a variable that does not hold.
    """
    from phimlx.preferences.file import read_preferences

    context = click.get_current_context(silent=True)
    if context is None:
        return read_preferences()
    if READ not in context.meta:
        context.meta[READ] = read_preferences()
    found: Preferences = context.meta[READ]
    return found


def prepared(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command begin with what the user prefers of this machine.

    The folder of models and the room for prompts are told to the libraries that read them from
    the environment, unless that says otherwise. A command that is looked up again stays as it is.
    """
    if hasattr(callback, PREPARED):
        return callback

    @wraps(callback)
    def begin(*arguments: Any, **keywords: Any) -> Any:
        apply(preferences())
        return callback(*arguments, **keywords)

    setattr(begin, PREPARED, True)
    return begin


def apply(found: Preferences) -> None:
    """Put into the environment what is read from there."""
    from phimlx.hub.layout import VARIABLE

    store, limit = found.get("store"), found.get("cache_limit")
    if store is not None and not {VARIABLE, "HF_HOME"} & os.environ.keys():
        os.environ[VARIABLE] = os.path.expanduser(store)
    if limit is not None:
        os.environ.setdefault("PHIMLX_CACHE_LIMIT", f"{limit:g}")
    if found.get("theme") == "plain":
        os.environ.setdefault("NO_COLOR", "1")
