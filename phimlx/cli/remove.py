"""`phimlx remove`: delete a model from this machine, after asking."""

from __future__ import annotations

import click

from phimlx.cli.options import json_option
from phimlx.terminal.output import Output


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--original", is_flag=True, help="Remove an alias's original, not the one at 4 bits.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
def command(model: str, original: bool, yes: bool, as_json: bool) -> None:
    """Delete MODEL, an alias or a Hub id, from the Hub's cache: all its revisions and what is
    half there.

    An alias means the model at 4 bits where that is here, else the original. No other model is
    touched.
    """
    from phimlx import catalog
    from phimlx.errors import ModelNotFoundError
    from phimlx.hub import cache, resolve
    from phimlx.sizes import size_text

    output = Output(json=as_json)
    model = str(resolve.meant(model))
    known = catalog.find(model)
    if known is not None and known.repo is None:
        raise ModelNotFoundError(f"{model} comes with phimlx and goes with it.")
    if resolve.is_folder(model):
        raise ModelNotFoundError(
            f"{model} is a folder; only models in the Hub's cache are removed.",
            hint="Delete the folder yourself.",
        )
    found = map(cache.find_model, resolve.repositories(model, original))
    cached = next((each for each in found if each is not None), None)
    if cached is None:
        raise ModelNotFoundError(
            f"{model} is not on this machine.", hint="See what is with: phimlx list"
        )
    if not yes:
        if not output.can_ask:
            raise click.UsageError("Nobody can be asked here: add --yes to delete without asking.")
        question = f"Delete {cached.repository}, {size_text(cached.nbytes)}?"
        if not output.confirm(question):
            output.note("Nothing is deleted.")
            raise click.Abort
    cache.remove(cached)
    output.json({"model": model, "repository": cached.repository, "bytes": cached.nbytes})
    output.text(f"Deleted {cached.repository}: {size_text(cached.nbytes)} are free again.")
