"""`phimlx cache`: what is kept on disk of long prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.options import json_option
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.generation.prefix_store import Entry


@click.command()
@click.argument("action", metavar="list|clear", type=click.Choice(["list", "clear"]))
@click.option("--model", metavar="MODEL", help="Of this model alone: its alias, Hub id or folder.")
@json_option
def command(action: str, model: str | None, as_json: bool) -> None:
    """List or clear what is kept of long prompts, so that a text asked about again is not read
    again.

    generate and chat keep keys and values of prompts over 1,024 tokens; --no-cache does without.
    The files tell what was asked and said, and their owner alone may read them. They take 10 GB at
    most, or as many as PHIMLX_CACHE_LIMIT says, 0 for none; what was used longest ago goes first.
    """
    from phimlx.errors import CacheError
    from phimlx.files import translate_read_errors
    from phimlx.generation.prefix_store import (
        list_entries,
        prefixes_folder,
        prefixes_limit,
        remove_unfinished,
    )
    from phimlx.sizes import counted, size_text

    output = Output(json=as_json)
    folder = prefixes_folder()
    with translate_read_errors(folder, CacheError):
        described = [(entry, describe(entry)) for entry in list_entries(folder)]
    if model is not None:
        wanted = names_of(model)
        described = [each for each in described if wanted & {each[1]["model"], each[1]["folder"]}]
    total = sum(entry.nbytes for entry, _ in described)
    about = {"folder": str(folder), "limit": prefixes_limit(), "bytes": total}
    if action == "clear":
        for entry, _ in described:
            entry.remove()
        if model is None:
            remove_unfinished(folder)
        left = [entry for entry, _ in described if entry.path.exists()]
        if left:
            raise CacheError(f"{left[0].path} cannot be deleted.")
        output.json({**about, "deleted": len(described)})
        output.text(
            f"Deleted {counted(len(described), 'prompt')}: {size_text(total)} are free again."
        )
        return
    output.json({**about, "prompts": [entry for _, entry in described]})
    if described and not as_json:
        output.table(
            ["model", "tokens", "size", "last used"],
            [
                (
                    each["model"] or "unreadable",
                    f"{each['tokens']:,}",
                    size_text(each["bytes"]),
                    each["last_used"][:16].replace("T", " "),
                )
                for _, each in described
            ],
        )
        output.text()
    output.text(f"{size_text(total)} of {size_text(prefixes_limit())} in {folder}")


def describe(entry: Entry) -> dict[str, Any]:
    """Make the object that `--json` prints of a prompt; without a model where it cannot be read."""
    from phimlx.errors import CacheError
    from phimlx.generation.prefix_file import open_prefix

    name = folder = adapter = kv_bits = None
    try:
        with open_prefix(entry.path) as file:
            name, folder, kv_bits = file.name, file.path, file.key.kv_bits
            adapter = file.key.adapter is not None
    except CacheError:
        pass
    return {
        "model": name,
        "folder": folder,
        "adapter": adapter,
        "kv_bits": kv_bits,
        "tokens": entry.tokens,
        "bytes": entry.nbytes,
        "last_used": entry.last_used.isoformat(timespec="seconds"),
        "path": str(entry.path),
    }


def names_of(model: str) -> set[str]:
    """List what a prompt's file may call a model that a person names."""
    from phimlx import catalog

    known = catalog.find(model)
    folder = Path(model).expanduser()
    return {model, str(folder.resolve())} | ({known.alias} if known else set())
