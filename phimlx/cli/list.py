"""`phimlx list`: the models on this machine.

Knows how the answer is told; what there is, `phimlx.hub.cache` knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phimlx.cli.options import json_option
from phimlx.terminal.output import Output


@click.command()
@json_option
def command(as_json: bool) -> None:
    """List the models on this machine: size, bits, whether they are complete, last use.

    Each by the name that --model takes. They lie in the Hub's cache, whoever brought them there;
    models of other families that lie there too are left out.
    """
    from phimlx.hub import cache as store
    from phimlx.hub import resolve as hub
    from phimlx.sizes import size_text

    output = Output(json=as_json)
    bundled = map(describe_bundled, (hub.NANO, hub.NANO_MULTIMODAL))
    entries = [*bundled, *map(describe, store.models())]
    total = sum(entry["bytes"] for entry in entries if entry["repository"])
    output.json({"store": str(store.cache()), "bytes": total, "models": entries})
    if as_json:
        return
    output.table(
        ["model", "size", "bits", "state", "last used"],
        [
            (
                entry["name"],
                size_text(entry["bytes"]),
                entry["bits"],
                entry["state"],
                (entry["last_used"] or "")[:10],
            )
            for entry in entries
        ],
    )
    output.text()
    output.text(f"{size_text(total)} in {store.cache()}")
    for entry in entries:
        if entry["state"] == "partial":
            output.note(f"Go on with: phimlx download {entry['name']}")


def describe(stored: Any) -> dict[str, Any]:
    """A model of the store, as `--json` prints it."""
    from phimlx import catalog

    known = catalog.find(stored.repository)
    aliased = known is not None and stored.repository == known.quantized_repo
    return {
        "name": stored.alias if aliased else stored.repository,
        "repository": stored.repository,
        "path": None if stored.snapshot is None else str(stored.snapshot),
        "bytes": stored.nbytes,
        "bits": stored.bits,
        "state": "partial" if stored.snapshot is None else "complete",
        "last_used": stored.last_used and stored.last_used.isoformat(timespec="seconds"),
    }


def describe_bundled(folder: Path) -> dict[str, Any]:
    """A model that comes along, in the same form."""
    from phimlx.hub import cache as store

    return {
        "name": folder.name,
        "repository": None,
        "path": str(folder),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "bits": store.bits_of(folder),
        "state": "complete",
        "last_used": None,
    }
