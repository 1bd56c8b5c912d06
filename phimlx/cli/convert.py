"""`phimlx convert`: a model to an MLX folder, quantized or not, and back to the Hub's layout.

Knows the flags and how the result is told; the work is `convert`'s.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from phimlx.cli.learning import learning_options, read_learning, run_learning
from phimlx.cli.options import adapter_option, json_option
from phimlx.errors import DownloadError, ModelAbsentError
from phimlx.sizes import size_text
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from convert import Conversion, Plan
    from convert.export.gguf import GgufPlan
    from convert.read import WeightFiles

BITS = ("2", "3", "4", "5", "6", "8")
GROUP_SIZES = ("16", "32", "64", "128")
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
DTYPES = ("float16", "bfloat16", "float32")
EXPORTS = ("hf", "gguf", "gguf-q8_0")
WITH_RECIPE = ("--q-group-size", "--q-adapters", "--q-encoders")  # what a recipe leaves open


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
    help="Quantize with more bits where they matter most: mixed-3-5, mixed-4-5, mixed-4-6, "
    "mixed-6-8, or a .toml file of your own.",
)
@click.option(
    "--q-adapters",
    "adapters",
    is_flag=True,
    help="Quantize a multimodal model's adapters too, to 8 bits, with -q or --recipe.",
)
@click.option(
    "--q-encoders",
    "encoders",
    is_flag=True,
    help="Quantize its image and audio encoders too, to 8 bits, with -q or --recipe.",
)
@learning_options
@click.option("--dequantize", "-d", is_flag=True, help="Make plain weights of quantized ones.")
@adapter_option
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
@click.option(
    "--upload-repo",
    metavar="OWNER/NAME",
    help="Publish OUT on the Hub when it is complete; without MODEL, an OUT that is there.",
)
@click.option(
    "--private",
    is_flag=True,
    help="Make that repository one that only you see, with --upload-repo.",
)
@click.option(
    "--token", metavar="TOKEN", help="The Hub's token  [default: HF_TOKEN or your log-in]"
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
    adapters: bool,
    encoders: bool,
    method: str | None,
    target_bits: float | None,
    calibration: Path | None,
    calibration_samples: int | None,
    calibration_length: int | None,
    learning_steps: int | None,
    learning_rate: float | None,
    dequantize: bool,
    adapter: Path | None,
    export: str | None,
    keep_original: bool,
    report: bool,
    report_text: Path | None,
    dtype: str | None,
    upload_repo: str | None,
    private: bool,
    token: str | None,
    as_json: bool,
) -> None:
    """Convert MODEL, an alias, a Hub id or a folder, to an MLX folder that mlx-lm loads too.

    \b
      phimlx convert nano --mlx-path nano-4bit -q
      phimlx convert microsoft/phi-4 --mlx-path phi-4-mixed --recipe mixed-4-6
      phimlx convert phi-4-mixed --mlx-path phi-4-plain --dequantize
      phimlx convert --mlx-path phi-4-mixed --upload-repo me/phi-4-mixed

    A model that is not on this machine comes from the Hub, each file converted as it arrives. OUT
    appears when it is complete, and not at all where something goes wrong; a run that was killed
    goes on where it was when it is started again.
    """
    output = Output(json=as_json)
    if private and upload_repo is None:
        raise click.UsageError("--private goes with --upload-repo.")
    if upload_repo is not None and source is None and named is None:
        _publish_only(out, upload_repo, token, private, output)
        return
    if (source is None) == (named is None):
        given = "is given twice" if source else "is missing"
        raise click.UsageError(f"MODEL {given}: name one model to convert.")
    _check_together(
        {"-q": quantize, "--recipe": recipe, "--dequantize": dequantize, "--export": export},
        {
            "--q-bits": bits,
            "--q-mode": mode,
            "--q-group-size": group_size,
            "--q-adapters": adapters,
            "--q-encoders": encoders,
            "--q-method": method,
        },
    )
    learning = read_learning(
        method,
        {
            "target_bits": target_bits,
            "calibration": calibration,
            "calibration_samples": calibration_samples,
            "calibration_length": calibration_length,
            "learning_steps": learning_steps,
            "learning_rate": learning_rate,
        },
    )

    if dtype and export and export != "hf":
        raise click.UsageError(
            f"--export {export} says the type of the weights: leave --dtype out."
        )

    if report and export and export != "hf":
        raise click.UsageError(f"--report reads model folders: leave it out of --export {export}.")
    if upload_repo and export and export != "hf":
        raise click.UsageError(
            f"--upload-repo publishes model folders: leave it out of --export {export}."
        )
    _check_adapter(adapter, learning is not None, export, report)
    if report_text is not None and not report:
        raise click.UsageError("--report-text goes with --report.")
    if report and learning and calibration == report_text:
        raise click.UsageError(
            "--report would measure on the text that the weights are learned from: give another "
            "one with --report-text or --calibration."
        )

    from convert import Quantization, Recipe, read_recipe
    from convert.quantize.recipe import PARTS
    from phimlx.cli.publish import check_target, existing, publish
    from phimlx.cli.report import add_report, read_text
    from phimlx.hub.resolve import resolve

    groups = int(group_size) if group_size else None
    chosen: Quantization | Recipe | str | None = None
    if recipe is not None:
        chosen = read_recipe(Path(recipe)) if recipe.endswith(".toml") else recipe
    elif quantize:
        chosen = Quantization.of(mode or "affine", int(bits) if bits else None, groups)
    text = read_text(report_text)
    target = None
    if upload_repo is not None:
        if os.path.lexists(out):
            raise existing(out, upload_repo)
        target = check_target(upload_repo, token, private, output)
    form: dict[str, Any] = {
        "recipe": chosen,
        "dtype": dtype,
        "dequantize": dequantize,
        "group_size": groups,
        "parts": [part for part, given in zip(PARTS, (adapters, encoders), strict=True) if given],
        "layout": export or "mlx",
    }
    if learning is not None:
        form["method"] = learning
    if adapter is not None:
        form["adapter"] = adapter
    name = source or named or ""
    try:
        folder = resolve(name, original=True)
    except ModelAbsentError as absent:
        if report and not keep_original:
            raise click.UsageError(
                f"--report compares with the original, and {name} is not on this machine: add "
                "--keep-original."
            ) from absent
        if learning and not keep_original:
            raise click.UsageError(
                f"--q-method {method} reads the model many times, and {name} is not on this "
                "machine: add --keep-original."
            ) from absent
        result = _from_hub(name, out, form, keep_original, token, absent, output)
    else:
        result = _from_folder(folder, out, form, output)
    if not as_json:
        tell(result, output)
    measured = add_report(result, text, output) if report else {}
    published = publish(result.path, target, output) if target else {}
    output.json({**as_object(result), **measured, **published})


def _publish_only(out: Path, name: str, token: str | None, private: bool, output: Output) -> None:
    """Upload a folder that was converted before."""
    from phimlx.cli.publish import check_target, publish
    from phimlx.hub.upload import published_files

    given = click.get_current_context().get_parameter_source
    idle = ("out", "upload_repo", "private", "token", "as_json", "debug")
    for parameter in command.params:
        if parameter.name not in idle and given(str(parameter.name)) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"MODEL is missing: {parameter.opts[0]} goes with a conversion.")
    if not out.is_dir():
        raise click.UsageError(f"MODEL is missing, and there is no folder {out} to upload.")
    published_files(out)  # refuses half a model before the Hub is asked
    published = publish(out, check_target(name, token, private, output), output)
    output.json({"path": str(out), **published})


def _plan(
    folder: Path, out: Path, form: dict[str, Any], files: WeightFiles | None = None
) -> Plan | GgufPlan:
    from convert import plan
    from convert.export.gguf import KINDS, plan_gguf

    if form["layout"] in KINDS:
        kind, dequantize = KINDS[form["layout"]], form["dequantize"]
        return plan_gguf(folder, out, kind, dequantize=dequantize, files=files)
    return plan(folder, out, files=files, **form)


def _from_folder(folder: Path, out: Path, form: dict[str, Any], output: Output) -> Conversion:
    from convert import Plan

    planned = _plan(folder, out, form)
    if isinstance(planned, Plan) and planned.lesson is not None:
        return run_learning(planned, output)
    with output.progress(planned.bytes_before, "Converting", "B") as bar:
        return planned.run(bar.update)


def _from_hub(
    name: str,
    out: Path,
    form: dict[str, Any],
    keep_original: bool,
    token: str | None,
    absent: ModelAbsentError,
    output: Output,
) -> Conversion:
    """Convert each weight file as it arrives, or download the whole model first."""
    from huggingface_hub import constants

    from convert.streaming import arriving
    from phimlx.cli.bars import download_bars, logger
    from phimlx.hub.client import Remote
    from phimlx.hub.download import download

    if constants.HF_HUB_OFFLINE:
        raise absent
    remote = Remote(token, log=logger(output))
    if keep_original:
        here = download(name, original=True, remote=remote, show_progress=download_bars(output))
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
        if value and "--recipe" in given and name not in WITH_RECIPE:
            raise click.UsageError(f"{name} and --recipe exclude each other: the recipe says it.")


def _check_adapter(adapter: Path | None, learns: bool, export: str | None, report: bool) -> None:
    """Refuse what needs the fused model as a folder of its own."""
    others = {"--q-method": learns, f"--export {export}": export not in (None, "hf")}
    for name, value in {**others, "--report": report}.items():
        if adapter is not None and value:
            raise click.UsageError(
                f"--adapter-path does not go with {name}: fuse first, with phimlx fuse, and "
                "convert the fused model."
            )


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
