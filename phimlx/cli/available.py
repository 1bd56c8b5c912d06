"""What can be had: every model of the catalogue, and whether it suits this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.catalog import Model


def show_available(output: Output) -> None:
    """Print every model of the catalogue: what it takes and is good at, if it fits and is here."""
    from phimlx import catalog
    from phimlx.machine.memory import machine_memory
    from phimlx.sizes import size_text

    here = machine_memory()
    entries = [available_entry(model, here) for model in catalog.FAMILY]
    output.json({"machine_memory": here, "models": entries})
    output.table(
        ["model", "size", "bits", "good at", "fits", "here"],
        [
            (
                entry["name"],
                size_text(entry["bytes"]),
                entry["bits"],
                entry["good_at"],
                _reach(entry),
                entry["state"],
            )
            for entry in entries
        ],
    )
    output.text()
    output.text(f"This machine has {size_text(here)} for a model; tokens are prompt and reply.")
    if not output.as_json:
        output.note("Get one with: phimlx download NAME")


def available_entry(model: Model, memory: int) -> dict[str, Any]:
    """Make the object that `--json` prints of a model of the catalogue, as its alias brings it.

    Args:
        memory: that a model may take here, in bytes.
    """
    from phimlx.machine.memory import longest_context

    bundled = model.repo is None
    packed = model.quantized_repo is not None
    nbytes = model.quantized_nbytes if packed else model.nbytes
    itemsize = model.stored_itemsize
    longest = min(model.context_length, longest_context(model, nbytes, memory, itemsize))
    return {
        "name": model.alias,
        "repository": model.quantized_repo or model.repo,
        "bytes": nbytes,
        "bits": 4 if packed else 8 * itemsize,
        "good_at": model.good_at,
        "context_length": model.context_length,
        "longest_context_here": longest,
        "licence": model.licence,
        "state": "complete" if bundled else _state(model),
    }


def _state(model: Model) -> str | None:
    """Say how much of a model is here, quantized or not: `complete`, `partial` or nothing."""
    from phimlx.hub.cache import find_model

    repos = [repo for repo in (model.quantized_repo, model.repo) if repo is not None]
    found = [cached.state for repo in repos if (cached := find_model(repo)) is not None]
    return next((state for state in ("complete", "partial", "unreadable") if state in found), None)


def _reach(entry: dict[str, Any]) -> str:
    longest = entry["longest_context_here"]
    if longest >= entry["context_length"]:
        return "yes"
    return f"to {longest // 1000 * 1000 or longest:,} tokens" if longest else "no"
