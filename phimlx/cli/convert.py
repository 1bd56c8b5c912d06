"""`phimlx convert`: a Hub-layout model to an MLX folder, quantized or not.

Knows the flags and how the result is told; the work is `convert`'s.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.options import json_option
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from convert import Conversion

BITS = ("2", "3", "4", "5", "6", "8")
GROUP_SIZES = ("32", "64", "128")
DTYPES = ("float16", "bfloat16", "float32")
DEFAULT_BITS = "4"
DEFAULT_GROUP_SIZE = "64"


@click.command()
@click.argument("source", metavar="MODEL", required=False)
@click.option("--model", "--hf-path", "named", metavar="MODEL", help="The same as MODEL.")
@click.option(
    "--mlx-path",
    "out",
    metavar="OUT",
    required=True,
    type=click.Path(path_type=Path),
    help="The folder to make.",
)
@click.option("--quantize", "-q", is_flag=True, help="Quantize the weights.")
@click.option(
    "--q-bits",
    "bits",
    type=click.Choice(BITS),
    help=f"Bits a weight, with -q  [default: {DEFAULT_BITS}]",
)
@click.option(
    "--q-group-size",
    "group_size",
    type=click.Choice(GROUP_SIZES),
    help=f"Weights that share a scale, with -q  [default: {DEFAULT_GROUP_SIZE}]",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Type of what is not quantized  [default: as it is stored]",
)
@json_option
def command(
    source: str | None,
    named: str | None,
    out: Path,
    quantize: bool,
    bits: str | None,
    group_size: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Convert MODEL, an alias, a Hub id or a folder, to an MLX folder that mlx-lm loads too.

    \b
      phimlx convert nano --mlx-path nano-4bit -q
      phimlx convert microsoft/phi-4 --mlx-path phi-4-8bit -q --q-bits 8

    OUT appears when it is complete, and not at all where something goes wrong.
    """
    if (source is None) == (named is None):
        given = "is given twice" if source else "is missing"
        raise click.UsageError(f"MODEL {given}: name one model to convert.")
    if not quantize and (bits or group_size):
        option = "--q-bits" if bits else "--q-group-size"
        raise click.UsageError(f"{option} goes with -q, which quantizes the weights.")

    from convert import Quantization, plan
    from phimlx import hub

    quantization = None
    if quantize:
        quantization = Quantization(
            int(group_size or DEFAULT_GROUP_SIZE), int(bits or DEFAULT_BITS)
        )
    output = Output(json=as_json)
    planned = plan(hub.resolve(source or named, original=True), out, quantization, dtype)
    with output.progress(planned.bytes_before, "Converting", "B") as bar:
        result = planned.run(bar.update)
    if as_json:
        output.json(as_object(result))
    else:
        tell(result, output)


def as_object(result: Conversion) -> dict[str, Any]:
    """The result for --json."""
    return {**asdict(result), "path": str(result.path), "source": str(result.source)}


def tell(result: Conversion, output: Output) -> None:
    """The result for a person."""
    from phimlx.sizes import size_text

    output.text(
        f"{result.path}: {size_text(result.bytes_after)} from {size_text(result.bytes_before)}, "
        f"{result.bits_per_weight:.2f} bits per weight, {result.tensors} tensors, "
        f"{result.seconds:.1f} s"
    )
    left, chosen = result.unquantized, result.quantization
    if left and chosen is not None:
        output.warning(
            f"{len(left)} layers stay unquantized, since groups of {chosen.group_size} do not "
            f"divide their width: {left[0]}"
            + (f" and {len(left) - 1} more." if len(left) > 1 else ".")
        )
    output.note(f"Try it: phimlx chat --model {result.path}")
