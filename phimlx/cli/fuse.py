"""`phimlx fuse`: a model and its adapter to one model, or an adapter to another format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phimlx.cli.convert import DTYPES, as_object, print_summary
from phimlx.cli.options import adapter_option, json_option, own_adapter
from phimlx.sizes import counted
from phimlx.terminal.output import Output

EXPORTS = ("peft", "mlx-lm")
NOTED = 0.01  # share of the adapter's change that rounding may take without a word


@click.command()
@click.option("--model", metavar="MODEL", help="An alias, a Hub id or a folder.")
@adapter_option
@click.option(
    "--save-path",
    "--mlx-path",
    "out",
    metavar="OUT",
    required=True,
    type=click.Path(path_type=Path),
    help="The folder to make.",
)
@click.option(
    "--dequantize",
    "-d",
    is_flag=True,
    help="Make unquantized weights of quantized ones, which keep what the adapter learned.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Type of what is not quantized  [default: as it is stored]",
)
@click.option(
    "--export",
    type=click.Choice(EXPORTS),
    help="Fuse nothing, but write the adapter as a folder for PEFT and transformers, or for "
    "mlx-lm; --model may be left out.",
)
@json_option
def command(
    model: str | None,
    adapter: str | None,
    out: Path,
    dequantize: bool,
    dtype: str | None,
    export: str | None,
    as_json: bool,
) -> None:
    """Merge an adapter into a model's weights, and write the model that this makes.

    \b
      phimlx fuse --model phi-4-mini --adapter-path adapters --save-path my-phi
      phimlx fuse --adapter-path adapters --save-path for-peft --export peft

    Quantized weights are quantized again as they were, which costs a part of what was learned;
    how much is told. OUT appears when it is complete.
    """
    output = Output(json=as_json)
    adapter = adapter or own_adapter(model)
    if adapter is None:
        raise click.UsageError("--adapter-path is missing: name the adapter's folder.")
    if export is not None:
        if dequantize or dtype:
            raise click.UsageError(
                "--export writes the adapter alone: leave --dequantize and --dtype out."
            )
        output.json(_export(export, model, adapter, out, output))
        return
    if model is None:
        raise click.UsageError("--model is missing: name the model that the adapter is for.")

    from convert import ConversionPlan, ConversionRequest, plan_conversion
    from phimlx.hub.resolve import resolve

    request = ConversionRequest(
        resolve(model), out, dtype=dtype, dequantize=dequantize, adapter=adapter
    )
    plan = plan_conversion(request)
    assert isinstance(plan, ConversionPlan)
    assert plan.fusion is not None
    with output.progress(plan.bytes_before, "Fusing", "B") as bar:
        result = plan.run(bar.update)
    lost = plan.fusion.rounding.share
    if not as_json:
        print_summary(result, output)
    if lost > NOTED:
        form, instead = str(result.dtype or "the stored types"), "--dtype float32"
        if result.quantization is not None:
            form, instead = f"{result.quantization.bits} bits", "--dequantize"
        output.warning(
            f"Rounding to {form} put an error on the fused layers that is {lost:.0%} of what the "
            f"adapter changed; {instead} avoids most of it."
        )
    output.json({**as_object(result), "adapter": adapter, "rounding_error": lost})


def _export(
    format: str, model: str | None, adapter: str, out: Path, output: Output
) -> dict[str, Any]:
    """Write an adapter in another format; returns what `--json` prints."""
    from convert.export.adapter import export_adapter
    from phimlx.hub.resolve import resolve

    folder = None if model is None else resolve(model)
    found = export_adapter(adapter, out, format, folder)
    output.text(
        f"{out}: {found.kind}, {counted(len(found.arrays), 'tensor')}, {found.size:,} numbers"
    )
    return {
        "path": str(out),
        "format": format,
        "kind": found.kind,
        "tensors": len(found.arrays),
        "parameters": found.size,
    }
