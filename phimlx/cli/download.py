"""`phimlx download`: bring a model from the Hub to this machine.

Knows the flags and how the result is told; the work is `phimlx.hub`'s.
"""

from __future__ import annotations

import click

from phimlx.cli.options import json_option
from phimlx.terminal.output import Output


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--revision", metavar="R", help="A branch, tag or commit  [default: main]")
@json_option
def command(model: str, revision: str | None, as_json: bool) -> None:
    """Bring MODEL, an alias or a Hub id, to this machine.

    An alias brings the model at 4 bits; the original comes by its Hub id:

    \b
      phimlx download phi-4-mini
      phimlx download microsoft/Phi-4-mini-instruct

    It goes to the Hub's own cache, where mlx-lm and transformers find it too.
    """
    from phimlx import hub
    from phimlx.sizes import size_text

    output = Output(json=as_json)
    folder = hub.download(model, revision)
    nbytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    output.json({"model": model, "path": str(folder), "bytes": nbytes})
    output.text(f"{folder}: {size_text(nbytes)}")
    if not as_json:
        output.note(f"Try it: phimlx chat --model {model}")
