"""`phimlx extract`: data of a given shape out of pictures, sounds and texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.furnish import Flags, furnish
from phimlx.cli.options import (
    MULTIMODAL,
    adapter_option,
    batch_size_option,
    dtype_option,
    json_option,
    kv_bits_option,
    limit_options,
    load_or_download,
    model_option,
    pop_limits,
    sampling_options,
    system_option,
)
from phimlx.cli.shapes import read_schema_argument
from phimlx.preferences.sampling import given
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.prompt_file import Result

FORMATS = ("jsonl", "csv")


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option(
    "--schema",
    metavar="SCHEMA",
    required=True,
    help="What to read out: a file, JSON, or fields such as "
    '"shop, total float: in euros, items [str]".',
)
@click.option(
    "--output",
    "-o",
    "output_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    required=True,
    help="Write one row a file to this file.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="Objects, one a line, or a table  [default: csv where --output ends so, else jsonl]",
)
@click.option("--prompt", "-p", metavar="TEXT", help="What to tell the model, above the schema.")
@model_option
@adapter_option
@dtype_option
@kv_bits_option
@system_option
@sampling_options
@batch_size_option("Files that are read together.")
@limit_options()
@json_option
def command(
    files: tuple[str, ...],
    schema: str,
    output_file: Path,
    form: str | None,
    prompt: str | None,
    model: str | None,
    adapter: str | None,
    dtype: str | None,
    kv_bits: int | None,
    system: str | None,
    batch_size: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Read data out of each FILE, a picture, a sound or a text, in the shape of a schema.

    \b
      phimlx extract receipts/*.jpg --schema "shop, date, total float" -o receipts.csv

    Each file is a row, one that cannot be read too, with the reason; the exit code is 1 then.
    After an interruption the same command goes on where it was. Pictures and sounds are given to
    phi-4-multimodal where no other model is named.
    """
    from phimlx.extraction import TASK, extract
    from phimlx.media.kinds import kind_of
    from phimlx.prompt_file import refuse_existing
    from phimlx.terminal.prompt_file import finish, follow

    output, limits = Output(json=as_json), pop_limits(settings)
    shape = read_schema_argument(schema)
    refuse_existing(output_file)
    form = form or ("csv" if output_file.suffix.lower() == ".csv" else "jsonl")
    usual = MULTIMODAL if any(map(kind_of, files)) else None
    begun = furnish(Flags(model, None, adapter, system, None, kv_bits, usual), settings, None)
    phi = load_or_download(begun.model, output, begun.adapter, dtype=dtype)
    own = given({**begun.conversation.settings, "kv_bits": begun.kv_bits})

    def answer(advance: Callable[[int], object]) -> Result:
        return extract(
            phi,
            files,
            output_file,
            shape,
            {**own, "limits": limits},
            form=form,
            task=prompt or TASK,
            system=begun.conversation.system,
            about=[str(phi.path.resolve()), str(begun.adapter), str(dtype)],
            batch_size=batch_size,
            advance=advance,
        )

    result = follow(answer, len(files), "file", output_file, output)
    finish(result, "file", output_file, output, lambda number: files[number - 1])
