"""The keys of the file of settings: what each accepts, and where it may stand."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import click

from phimlx.errors import PhimlxError, SettingsError, shortened
from phimlx.machine.kv_bits import KV_BITS
from phimlx.preferences.sampling import SETTINGS, FiniteRange, NonEmpty, Setting, convert

THEMES = ("auto", "dark", "light", "plain")


class Switch(click.ParamType[bool]):
    """True or false."""

    name = "true|false"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        named = {"true": True, "yes": True, "on": True, "1": True}
        named |= {"false": False, "no": False, "off": False, "0": False}
        found = value if isinstance(value, bool) else named.get(str(value).lower())
        if found is None:
            self.fail(f"{shortened(value)} is neither true nor false.", param, ctx)
        return found


def _setting(keyword: str, kind: click.ParamType[Any], text: str) -> Setting:
    return Setting(keyword, f"--{keyword.replace('_', '-')}", kind, text)


_TEXT = NonEmpty()
_MODEL = _setting("model", _TEXT, "What --model means where it is not given.")
_OF_MODEL = (
    _setting("adapter", _TEXT, "An adapter that goes with the model."),
    _setting("system", _TEXT, "What the model is told first."),
    *SETTINGS,
    _setting("kv_bits", click.Choice(KV_BITS), "Bits of keys and values."),
)
_OF_MACHINE = (
    _setting("store", _TEXT, "The folder of downloaded models."),
    _setting("cache_limit", FiniteRange(min=0), "GB for prompts that are kept; 0 for none."),
    _setting("theme", click.Choice(THEMES), "Colours of the terminal."),
    _setting("history", Switch(), "Whether conversations are kept."),
    _setting("speak", Switch(), "Whether a chat reads answers aloud."),
)

TOP = {key.keyword: key for key in (_MODEL, *_OF_MODEL, *_OF_MACHINE)}
"""Keys at the top of the file, each also as an environment variable: PHIMLX_TOP_P."""

SECTION = {key.keyword: key for key in _OF_MODEL}
"""Keys of `[models.NAME]`."""

ALIAS = {key.keyword: key for key in (_MODEL, *_OF_MODEL)}
"""Keys of `[alias.NAME]`."""

Keys = Mapping[str, Setting]


def spelled(keyword: str) -> str:
    """Return a key as the file spells it."""
    return keyword.replace("_", "-")


def find_key(keys: Keys, name: str, others: tuple[str, ...] = ()) -> Setting:
    """Find a key by its name, with dashes or underscores, or as its flag is called.

    Args:
        others: names of tables that may stand beside the keys, for suggestions.

    Raises:
        SettingsError: where there is none; the hint names the nearest.
    """
    wanted = name.replace("_", "-")
    named = {spelled(key.keyword): key for key in keys.values()}
    flags = {key.name: key for key in keys.values()}
    found = named.get(wanted) or flags.get(wanted)
    if found is None:
        close = difflib.get_close_matches(wanted, [*named, *flags, *others], 1)
        known = "The settings are " + ", ".join(named) + "."
        raise SettingsError(
            f"there is no setting {shortened(name)}.",
            hint=f"Did you mean {close[0]}?" if close else known,
        )
    return found


def check_value(key: Setting, value: Any) -> Any:
    """Return a value as a program has it; raises `SettingsError` for one that does not hold."""
    try:
        if not key.multiple:
            return _one(key, value)
        return tuple(_one(key, each) for each in (value if isinstance(value, list) else [value]))
    except PhimlxError as error:
        raise SettingsError(str(error)) from None


def _one(key: Setting, value: Any) -> Any:
    found = convert(key, value)
    texts = isinstance(key.type, click.Choice) and str(value) == str(found)
    if not texts and (found != value or isinstance(found, bool) != isinstance(value, bool)):
        raise SettingsError(f"{spelled(key.keyword)}: {shortened(value)} is not a valid value.")
    return found


def parse_value(key: Setting, text: str) -> Any:
    """Read a value that was written as text, as its flag would; raises `SettingsError`."""
    try:
        found = convert(key, text)
    except PhimlxError as error:
        raise SettingsError(str(error)) from None
    return (found,) if key.multiple else found
