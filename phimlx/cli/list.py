"""`phimlx list`: the models on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.available import show_available
from phimlx.cli.options import json_option
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.hub.cache import CachedModel


@click.command()
@click.option(
    "--available", is_flag=True, help="List what can be had instead: every model of the catalogue."
)
@json_option
def command(available: bool, as_json: bool) -> None:
    """List the models on this machine: size, bits, whether they are complete, last use.

    Each by the name that --model takes, and adapters by that which --adapter-path takes. They lie
    in the Hub's cache, whoever brought them there; those of other families are left out.
    """
    from phimlx.hub import cache, resolve
    from phimlx.hub.layout import cache_folder
    from phimlx.sizes import size_text

    output = Output(json=as_json)
    if available:
        show_available(output)
        return
    bundled = map(bundled_entry, (resolve.NANO, resolve.NANO_MULTIMODAL))
    entries = [*bundled, *map(cached_entry, cache.list_models())]
    total = sum(entry["bytes"] for entry in entries if entry["repository"])
    output.json({"store": str(cache_folder()), "bytes": total, "models": entries})
    if as_json:
        return
    output.table(
        ["model", "size", "bits", "state", "last used"],
        [
            (
                entry["name"],
                size_text(entry["bytes"]),
                entry["bits"],
                entry["kind"] if entry["kind"] == "adapter" and entry["path"] else entry["state"],
                (entry["last_used"] or "")[:10],
            )
            for entry in entries
        ],
    )
    output.text()
    output.text(f"{size_text(total)} in {cache_folder()}")
    for entry in entries:
        if entry["problem"]:
            output.warning(entry["problem"])
        if entry["state"] == "partial":
            output.note(f"Go on with: phimlx download {entry['name']}")


def cached_entry(model: CachedModel) -> dict[str, Any]:
    """Make the object that `--json` prints of a model in the cache."""
    from phimlx import catalog

    known = catalog.find(model.repository)
    aliased = known is not None and model.repository == known.quantized_repo
    return {
        "name": model.alias if aliased else model.repository,
        "kind": "adapter" if model.is_adapter else "model",
        "repository": model.repository,
        "path": None if model.snapshot is None else str(model.snapshot),
        "bytes": model.nbytes,
        "bits": model.bits,
        "state": model.state,
        "problem": model.problem,
        "last_used": model.last_used and model.last_used.isoformat(timespec="seconds"),
    }


def bundled_entry(folder: Path) -> dict[str, Any]:
    """Make the object of a model that comes along, in the same form."""
    from phimlx.hub.cache import bits_of

    return {
        "name": folder.name,
        "kind": "model",
        "repository": None,
        "path": str(folder),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "bits": bits_of(folder),
        "state": "complete",
        "problem": None,
        "last_used": None,
    }
