"""The file of settings, read once a command runs, and the order in which values count."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phimlx import catalog
from phimlx.errors import SettingsError, shortened
from phimlx.files import is_absent, parse_toml, read_text
from phimlx.folders import config_folder
from phimlx.preferences.keys import (
    ALIAS,
    SECTION,
    TOP,
    Keys,
    check_value,
    find_key,
    parse_value,
    spelled,
)

NAME = "config.toml"
PREFIX = "PHIMLX_"
TABLES = {"models": SECTION, "alias": ALIAS}
"""Tables of tables, by name, and the keys in each."""

MAX_BYTES = 1_000_000
MEND = "Mend it: phimlx config edit"
WRITABLE = "Make it yours to write, or set PHIMLX_CONFIG_DIR to another folder."
READABLE = "Make it yours to read, or set PHIMLX_CONFIG_DIR to another folder."

Values = dict[str, Any]


@dataclass(frozen=True)
class Value:
    """A value, and where it comes from: a variable, or a table of the file."""

    value: Any
    source: str


@dataclass(frozen=True)
class Choice:
    """A model and what goes with it, as flags, environment and file say.

    Attributes:
        name: as it was called; None where nobody named a model.
        model: what that means; an alias of the user's own is resolved.
        values: by keyword, among them `adapter`, `system`, `kv_bits` and those of sampling.
    """

    name: str | None
    model: str | None
    values: Mapping[str, Value]

    def get(self, keyword: str) -> Any:
        """Return a value, or None."""
        found = self.values.get(keyword)
        return None if found is None else found.value


@dataclass(frozen=True)
class Preferences:
    """What the file and the environment say.

    Attributes:
        top: values that hold for everything, by keyword.
        models: those for one model, by the name in the file.
        alias: names of the user's own.
    """

    path: Path
    top: Values = field(default_factory=dict)
    models: Mapping[str, Values] = field(default_factory=dict)
    alias: Mapping[str, Values] = field(default_factory=dict)
    environment: Mapping[str, Value] = field(default_factory=dict)

    def value(self, keyword: str) -> Value | None:
        """Return a value from the environment, else from the top of the file."""
        if keyword in self.environment:
            return self.environment[keyword]
        return Value(self.top[keyword], str(self.path)) if keyword in self.top else None

    def get(self, keyword: str) -> Any:
        """Return what `value` finds, without where it comes from."""
        found = self.value(keyword)
        return None if found is None else found.value

    def choose(self, name: str | None = None) -> Choice:
        """Find the model that a flag names, or that is meant without one, and its settings."""
        named = self.value("model")
        name = name or (None if named is None else named.value)
        own = self.alias.get(name, {}) if name else {}
        model = own.get("model", name)
        layers = [("", self.top)]
        layers += [
            (f" [models.{key}]", values)
            for key, values in self.models.items()
            if name and _same_model(key, name, model)
        ]
        layers += [(f" [alias.{name}]", own)]
        found = {
            keyword: Value(value, f"{self.path}{place}")
            for place, values in layers
            for keyword, value in values.items()
            if keyword in SECTION
        }
        given = {key: value for key, value in self.environment.items() if key in SECTION}
        return Choice(name, model, found | given)

    def resolve(self, name: str) -> str:
        """Return what a name means: an alias of the user's own is its model."""
        return str(self.alias.get(name, {}).get("model", name))


def _same_model(key: str, name: str, model: str | None) -> bool:
    known = catalog.find(key)
    return key in (name, model) or (
        known is not None and model is not None and catalog.find(model) is known
    )


def config_path() -> Path:
    """Return the path of the file of settings, whether it is there or not."""
    return config_folder() / NAME


def read_preferences() -> Preferences:
    """Read the file of settings, where there is one, and the environment.

    Raises:
        SettingsError: for a file or a variable that does not hold; it names which and why.
    """
    path = config_path()
    environment = dict(_environment())
    if is_absent(path):
        return Preferences(path, environment=environment)
    text = read_settings(path, MEND)
    try:
        return Preferences(path, **check_table(parse_toml(text)), environment=environment)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}", hint=_both(error.hint, MEND)) from None
    except ValueError as error:
        raise SettingsError(f"{path} is not TOML ({error}).", hint=MEND) from None


def read_settings(path: Path, mend: str) -> str:
    """Read a file of settings; `mend` says how one that can be read is changed.

    Raises:
        SettingsError: where it cannot be read, or is no text.
    """
    effective = os.access in os.supports_effective_ids
    readable = os.access(path, os.R_OK, effective_ids=effective)
    return read_text(path, SettingsError, hint=mend if readable else READABLE, limit=MAX_BYTES)


def read_alias(name: str | Path) -> Values:
    """Return what a name of the user's own stands for: `model`, and what goes with it.

    Empty for any other name: of the catalogue, of a path or of the Hub.

    Raises:
        SettingsError: as `read_preferences`, which such a name does without.
    """
    if isinstance(name, Path) or not name or "/" in name or catalog.find(name) is not None:
        return {}
    return read_preferences().alias.get(name, {})


def _both(hint: str | None, more: str) -> str:
    return more if hint is None else f"{hint} {more}"


def check_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file's values as a program has them, by table.

    Raises:
        SettingsError: for what is unknown, of the wrong type or out of bounds.
    """
    top = {name: value for name, value in table.items() if name not in TABLES}
    checked: dict[str, Any] = {"top": check_values(top, TOP, others=tuple(TABLES))}
    for name, keys in TABLES.items():
        rows = table.get(name, {})
        if not isinstance(rows, dict):
            raise SettingsError(f"{name} is {shortened(rows)}; it must be a table of tables.")
        checked[name] = {}
        for key, row in rows.items():
            if name == "alias" and isinstance(row, str):
                row = {"model": row}
            if not isinstance(row, dict):
                raise SettingsError(f"{name}.{key} is {shortened(row)}; it must be a table.")
            try:
                values = check_values(row, keys)
            except SettingsError as error:
                raise SettingsError(f"in {name}.{key}, {error}", hint=error.hint) from None
            if name == "alias":
                _check_alias(key, values)
            checked[name][key] = values
    return checked


def check_values(
    values: Mapping[str, Any], keys: Keys, others: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return values by keyword; raises `SettingsError` as `check_table`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = find_key(keys, name, others)
        if key.keyword in found:
            raise SettingsError(f"{spelled(key.keyword)} is given twice.")
        found[key.keyword] = check_value(key, value)
        if key.keyword in ("adapter", "model", "store"):
            found[key.keyword] = _expanded(found[key.keyword])
    return found


def _check_alias(name: str, values: Values) -> None:
    if "model" not in values:
        raise SettingsError(f"alias.{name} names no model.")
    if catalog.find(name) is not None:
        raise SettingsError(
            f"alias.{name} is the name of a model of the catalogue.", hint="Choose another name."
        )


def _expanded(text: str) -> str:
    return os.path.expanduser(text) if text.startswith("~") else text


def _environment() -> Iterator[tuple[str, Value]]:
    for keyword, key in TOP.items():
        variable = PREFIX + keyword.upper()
        text = os.environ.get(variable)
        if text:
            try:
                value = parse_value(key, text)
            except SettingsError as error:
                raise SettingsError(f"{variable}: {error}", hint="Unset it.") from None
            yield keyword, Value(value, variable)
