"""What a shell may put for a parameter, by the word that stands for its value in help."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import click
from click.shell_completion import CompletionItem

from phimlx.errors import PhimlxError

Candidates = Callable[[str], list[CompletionItem[Any]]]
"""What has been typed of a word -> what it could become."""

WORDS = re.compile(r"[A-Z_]+")


def files(typed: str) -> list[CompletionItem[Any]]:
    """Let the shell complete files."""
    return [CompletionItem(typed, type="file")]


def folders(typed: str) -> list[CompletionItem[Any]]:
    """Let the shell complete folders."""
    return [CompletionItem(typed, type="dir")]


def models(typed: str) -> list[CompletionItem[Any]]:
    """Complete the user's own names, the catalogue's and those in the store; else folders."""
    from phimlx import catalog

    own: list[str] = []
    with suppress(PhimlxError):  # which commands tell, and keys do not
        from phimlx.preferences.file import read_preferences

        own += read_preferences().alias
    return _names([*own, *(model.alias for model in catalog.FAMILY), *_stored(False)], typed)


def adapters(typed: str) -> list[CompletionItem[Any]]:
    """Complete adapters in the store, else folders."""
    return _names(_stored(True), typed)


def settings(typed: str) -> list[CompletionItem[Any]]:
    """Complete names of settings, with those of models and aliases that the file holds."""
    from phimlx.preferences.file import TABLES, read_preferences
    from phimlx.preferences.keys import TOP, spelled

    names = [spelled(keyword) for keyword in TOP]
    with suppress(PhimlxError):
        found = read_preferences()
        for table in TABLES:
            names += [
                f"{table}.{row}.{spelled(keyword)}"
                for row in getattr(found, table)
                for keyword in TABLES[table]
            ]
    return _beginning(names, typed)


def personas(typed: str) -> list[CompletionItem[Any]]:
    """Complete names of personas."""
    from phimlx.preferences.personas import list_personas

    with suppress(PhimlxError):
        return _beginning(list_personas(), typed)
    return []


OFFERS: dict[str, Candidates] = {
    **dict.fromkeys(("FILE", "PATH", "SCHEMA", "DATA"), files),
    **dict.fromkeys(("FOLDER", "FOLDER_OR_ID", "DIR", "OUT"), folders),
    "MODEL": models,
    "ADAPTER": adapters,
    "SETTING": settings,
    "PERSONA": personas,
}
"""The word in a parameter's metavar -> what is offered."""


def offer(command: click.Command) -> None:
    """Let the parameters of a command complete their values."""
    for parameter in command.params:
        word = parameter.metavar or ""
        found = next((OFFERS[each] for each in WORDS.findall(word) if each in OFFERS), None)
        if found is None and "|" in word and word.islower():
            found = partial(_beginning, word.strip("[],…").split("|"))
        if found is not None:
            _use(found, parameter)


def _use(found: Candidates, parameter: click.Parameter) -> None:
    def complete(ctx: click.Context, incomplete: str) -> list[CompletionItem[Any]]:
        return found(incomplete)

    parameter.shell_complete = complete  # type: ignore[method-assign]


def _beginning(names: Iterable[str], typed: str) -> list[CompletionItem[Any]]:
    return [CompletionItem(name) for name in dict.fromkeys(names) if name.startswith(typed)]


def _names(names: Iterable[str], typed: str) -> list[CompletionItem[Any]]:
    return _beginning(names, typed) or folders(typed)


def _stored(adapters: bool) -> list[str]:
    """Name the models or the adapters in the store."""
    with suppress(PhimlxError):
        from phimlx.cli.preferences import apply
        from phimlx.preferences.file import read_preferences

        apply(read_preferences())
        from phimlx.hub.cache import list_models

        return [each.repository for each in list_models() if each.is_adapter == adapters]
    return []
