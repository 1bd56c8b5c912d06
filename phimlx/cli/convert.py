"""`phimlx convert`: a model to an MLX folder, quantized or not, and back to the Hub's layout.

Knows the flags and how the result is told; the work is `convert`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.options import json_option
from phimlx.errors import DownloadError, ModelAbsentError
from phimlx.sizes import size_text
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from convert import Conversion, Plan
    from convert.blocks import WeightFiles
    from convert.gguf import GgufPlan

BITS = ("2", "3", "4", "5", "6", "8")
GROUP_SIZES = ("16", "32", "64", "128")
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
DTYPES = ("float16", "bfloat16", "float32")
EXPORTS = ("hf", "gguf", "gguf-q8_0")


@click.command()
@click.argument("source", metavar="MODEL", required=False)
@click.option("--model", "--hf-path", "named", metavar="MODEL", help="The same as MODEL.")
@click.option(
    "--mlx-path",
    "--out",
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
    help="Bits a weight, with -q  [default: 4, mxfp8: 8]",
)
@click.option(
    "--q-group-size",
    "group_size",
    type=click.Choice(GROUP_SIZES),
    help="Weights that share a scale, with -q or --recipe  [default: 64, mxfp4 and mxfp8: 32, "
    "nvfp4: 16]",
)
@click.option(
    "--q-mode",
    "mode",
    type=click.Choice(MODES),
    help="How weights are packed, with -q  [default: affine]",
)
@click.option(
    "--recipe",
    metavar="RECIPE",
    help="Quantize with more bits where they matter most: mixed-3-6, mixed-4-6, mixed-4-8, "
    "mixed-6-8, or a .toml file of your own.",
)
@click.option("--dequantize", "-d", is_flag=True, help="Make plain weights of quantized ones.")
@click.option(
    "--export",
    type=click.Choice(EXPORTS),
    help="Write another layout than MLX's: hf, as published on the Hub, for transformers; gguf, "
    "one file in half precision for llama.cpp; gguf-q8_0, the same at 8 bits.",
)
@click.option(
    "--keep-original",
    is_flag=True,
    help="Where MODEL comes from the Hub, keep it whole in the store.",
)
@click.option(
    "--report",
    is_flag=True,
    help="Measure what the conversion costs: perplexity, KL divergence, top-1 agreement, error of "
    "each layer; a table here, report.json, report.png and the model card in OUT.",
)
@click.option(
    "--report-text",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Text to measure on, with --report  [default: one that comes along]",
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
    mode: str | None,
    recipe: str | None,
    dequantize: bool,
    export: str | None,
    keep_original: bool,
    report: bool,
    report_text: Path | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Convert MODEL, an alias, a Hub id or a folder, to an MLX folder that mlx-lm loads too.

    \b
      phimlx convert nano --mlx-path nano-4bit -q
      phimlx convert microsoft/phi-4 --mlx-path phi-4-mixed --recipe mixed-4-6
      phimlx convert phi-4-mixed --mlx-path phi-4-plain --dequantize

    A model that is not on this machine comes from the Hub, each file converted as it arrives. OUT
    appears when it is complete, and not at all where something goes wrong; a run that was killed
    goes on where it was when it is started again.
    """
    if (source is None) == (named is None):
        given = "is given twice" if source else "is missing"
        raise click.UsageError(f"MODEL {given}: name one model to convert.")
    _check_together(
        {"-q": quantize, "--recipe": recipe, "--dequantize": dequantize, "--export": export},
        {"--q-bits": bits, "--q-mode": mode, "--q-group-size": group_size},
    )

    if dtype and export and export != "hf":
        raise click.UsageError(
            f"--export {export} says the type of the weights: leave --dtype out."
        )

    if report and export and export != "hf":
        raise click.UsageError(f"--report reads model folders: leave it out of --export {export}.")
    if report_text is not None and not report:
        raise click.UsageError("--report-text goes with --report.")

    from convert import Quantization, Recipe, read_recipe
    from phimlx import hub
    from phimlx.cli.report import add_report, read_text

    groups = int(group_size) if group_size else None
    chosen: Quantization | Recipe | str | None = None
    if recipe is not None:
        chosen = read_recipe(Path(recipe)) if recipe.endswith(".toml") else recipe
    elif quantize:
        chosen = Quantization.of(mode or "affine", int(bits) if bits else None, groups)
    text = read_text(report_text)
    output = Output(json=as_json)
    form: dict[str, Any] = {
        "recipe": chosen,
        "dtype": dtype,
        "dequantize": dequantize,
        "group_size": groups,
        "layout": export or "mlx",
    }
    name = source or named or ""
    try:
        folder = hub.resolve(name, original=True)
    except ModelAbsentError as absent:
        if report and not keep_original:
            raise click.UsageError(
                f"--report compares with the original, and {name} is not on this machine: add "
                "--keep-original."
            ) from absent
        result = _from_hub(name, out, form, keep_original, absent, output)
    else:
        result = _from_folder(folder, out, form, output)
    if not as_json:
        tell(result, output)
    measured = add_report(result, text, output) if report else {}
    output.json({**as_object(result), **measured})


def _plan(
    folder: Path, out: Path, form: dict[str, Any], files: WeightFiles | None = None
) -> Plan | GgufPlan:
    from convert import plan
    from convert.gguf import KINDS, plan_gguf

    if form["layout"] in KINDS:
        kind, dequantize = KINDS[form["layout"]], form["dequantize"]
        return plan_gguf(folder, out, kind, dequantize=dequantize, files=files)
    return plan(folder, out, files=files, **form)


def _from_folder(folder: Path, out: Path, form: dict[str, Any], output: Output) -> Conversion:
    planned = _plan(folder, out, form)
    with output.progress(planned.bytes_before, "Converting", "B") as bar:
        return planned.run(bar.update)


def _from_hub(
    name: str,
    out: Path,
    form: dict[str, Any],
    keep_original: bool,
    absent: ModelAbsentError,
    output: Output,
) -> Conversion:
    """Convert each weight file as it arrives, or download the whole model first."""
    from huggingface_hub import constants

    from convert.arriving import arriving
    from phimlx import hub
    from phimlx.cli.bars import watcher
    from phimlx.remote import Remote

    if constants.HF_HUB_OFFLINE:
        raise absent
    remote = Remote(tell=output.note)
    if keep_original:
        here = hub.download(name, original=True, remote=remote, watch=watcher(output))
        return _from_folder(here.folder, out, form, output)
    with arriving(name, out, remote) as model, _what_stays(output):
        planned = _plan(model.folder, out, form, model)
        output.note(
            f"{model.repository.name} is not on this machine: each of its {len(model.shards)} "
            f"weight files ({size_text(model.nbytes)}) is converted as it arrives, and not kept."
        )
        with output.progress(model.nbytes, "Downloading and converting", "B") as bar:
            model.report = bar.update
            return replace(planned.run(), source=Path(model.repository.name))


@contextmanager
def _what_stays(output: Output) -> Iterator[None]:
    """Say after an end that is nobody's fault that the work was not for nothing."""
    try:
        yield
    except (DownloadError, KeyboardInterrupt):
        output.note("What has come stays: the same command goes on from there.")
        raise


def _check_together(purposes: Mapping[str, object], details: Mapping[str, object]) -> None:
    """Refuse options that do not go together.

    Args:
        purposes: what is to become of the weights; `--dequantize` and `--export` may both be.
        details: how to quantize them.
    """
    given = [name for name, value in purposes.items() if value]
    quantizing = [name for name in given if name in ("-q", "--recipe")]
    if quantizing and given != quantizing:
        raise click.UsageError(
            f"{given[-1]} writes weights that are not quantized: leave {quantizing[0]} out."
        )
    for name, value in details.items():
        if value and not quantizing:
            raise click.UsageError(f"{name} goes with -q, which quantizes the weights.")
        if value and "--recipe" in given and name != "--q-group-size":
            raise click.UsageError(f"{name} and --recipe exclude each other: the recipe says it.")


def as_object(result: Conversion) -> dict[str, Any]:
    """The result for --json."""
    return {**asdict(result), "path": str(result.path), "source": str(result.source)}


def tell(result: Conversion, output: Output) -> None:
    """The result for a person."""
    output.text(
        f"{result.path}: {size_text(result.bytes_after)} from {size_text(result.bytes_before)}, "
        f"{result.bits_per_weight:.2f} bits per weight, {result.tensors} tensors, "
        f"{result.seconds:.1f} s"
    )
    left = result.undivided
    if left:
        output.warning(
            f"{len(left)} layers stay as they are, since groups do not divide their width: "
            f"{left[0]}" + (f" and {len(left) - 1} more." if len(left) > 1 else ".")
        )
    if result.path.is_dir():
        output.note(f"Try it: phimlx chat --model {result.path}")
