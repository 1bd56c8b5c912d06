"""Changes of the file of settings, which leave what else is in it as it was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.errors import SettingsError, clipped, shortened
from phimlx.files import is_absent, parse_toml, translate_write_errors, write_file
from phimlx.preferences.file import MEND, TABLES, WRITABLE, check_table, read_settings
from phimlx.preferences.keys import TOP, find_key, parse_value, spelled
from phimlx.preferences.sampling import Setting

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

TEMPLATE = """\
# Settings of phimlx. A flag comes first, then a variable such as PHIMLX_MODEL, then this file.

# model = "phi-4-mini"
# system = "Be brief."
# temperature = 0.7
# history = false

# [models.phi-4]
# kv-bits = 8

# [alias.work]
# model = "~/models/mine"
# adapter = "~/adapters/letters"
# system = "You write letters."
"""


def locate(name: str) -> tuple[tuple[str, ...], Setting]:
    """Find the table and the key that a dotted name means: `temperature`, `models.phi-4.seed`.

    Raises:
        SettingsError: where there is none.
    """
    table, dot, rest = name.partition(".")
    if not dot:
        return (), find_key(TOP, name, tuple(TABLES))
    if table not in TABLES:
        return (), find_key(TOP, name, tuple(TABLES))
    row, dot, key = rest.rpartition(".")
    if not dot and table == "alias":
        row, key = rest, "model"
    if not row or not key:
        raise SettingsError(
            f"{shortened(name)} names no setting.", hint=f"Write {table}.NAME.SETTING."
        )
    return (table, row.strip('"')), find_key(TABLES[table], key)


def set_value(path: Path, name: str, text: str) -> Any:
    """Set a value, given as text, in the file; return it as a program has it.

    Raises:
        SettingsError: for a name or a value that does not hold, a file that is damaged or cannot
            be written.
    """
    for given in (name, text):
        try:
            given.encode()
        except UnicodeEncodeError:
            raise SettingsError(f"{clipped(given)} is not UTF-8 text.") from None
    place, key = locate(name)
    value = parse_value(key, text)
    document = _read(path)
    table = _table(document, place, make=True)
    _remove(table, key)
    table[spelled(key.keyword)] = list(value) if key.multiple else value
    _write(path, document)
    return value


def unset_value(path: Path, name: str) -> bool:
    """Take a value, a section or an alias out of the file; tell whether it was there.

    Raises:
        SettingsError: as `set_value`.
    """
    document = _read(path)
    table, _, row = name.partition(".")
    rows: Any = document.get(table, {}) if table in TABLES else {}
    if row.strip('"') in rows:
        del rows[row.strip('"')]
    elif table in TABLES and "." not in row:
        return False
    else:
        place, key = locate(name)
        if not _remove(_table(document, place), key):
            return False
    _write(path, document)
    return True


def _read(path: Path) -> TOMLDocument:
    import tomlkit

    if is_absent(path):
        return tomlkit.document()
    text = read_settings(path, MEND)
    try:
        check_table(parse_toml(text))
        return tomlkit.parse(text)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}", hint=MEND) from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path} is not TOML ({error}).", hint=MEND) from None


def _table(document: TOMLDocument, place: tuple[str, ...], make: bool = False) -> Any:
    import tomlkit

    table: Any = document
    for depth, name in enumerate(place):
        if name not in table:
            if not make:
                return {}
            table[name] = tomlkit.table(is_super_table=depth == 0)
        elif isinstance(table[name], str):  # alias.work = "folder"
            model = str(table[name])
            table[name] = tomlkit.table()
            table[name]["model"] = model
        table = table[name]
    return table


def _remove(table: Any, key: Setting) -> bool:
    """Take a key out of a table, however it is spelled there."""
    names = [each for each in table if each not in TABLES and _is_named(each, key)]
    for name in names:
        del table[name]
    return bool(names)


def _is_named(name: str, key: Setting) -> bool:
    return name.replace("_", "-") in (spelled(key.keyword), key.name)


def _write(path: Path, document: Mapping[str, Any]) -> None:
    import tomlkit

    text = tomlkit.dumps(document)
    try:
        check_table(parse_toml(text))
    except SettingsError as error:  # such as an alias that has lost its model
        raise SettingsError(str(error), error.hint) from None
    with translate_write_errors(path, SettingsError, WRITABLE):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(path, text, private=True)
