"""`phimlx convert`: a model to an MLX folder, quantized or not, and back to the Hub's layout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from phimlx.cli.calibration import CalibrationFlags, run_calibrated
from phimlx.cli.flags import flag, flag_group
from phimlx.cli.options import adapter_option, json_option, own_adapter
from phimlx.cli.publish import PublishFlags
from phimlx.cli.report import ReportFlags
from phimlx.errors import DownloadError, ModelAbsentError
from phimlx.sizes import counted, size_text
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from convert import (
        CalibrationSettings,
        ConversionPlan,
        ConversionRequest,
        ConversionResult,
        Quantization,
        Recipe,
    )
    from convert.export.gguf import GgufPlan
    from convert.export.onnx import OnnxPlan

BITS = ("2", "3", "4", "5", "6", "8")
GROUP_SIZES = ("16", "32", "64", "128")
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
DTYPES = ("float16", "bfloat16", "float32")
EXPORTS = ("hf", "gguf", "gguf-q8_0", "onnx", "onnx-int4")
FOLDERS = (None, "hf")  # of these, what phimlx reads again
FILES = ("gguf", "gguf-q8_0")


@dataclass(frozen=True)
class QuantizationFlags:
    """The form of quantized weights."""

    quantize: bool = flag("--quantize", "-q", is_flag=True, help="Quantize the weights.")
    bits: str | None = flag(
        "--q-bits",
        type=click.Choice(BITS),
        help="Bits a weight, with -q  [default: 4, mxfp8: 8]",
    )
    group_size: str | None = flag(
        "--q-group-size",
        type=click.Choice(GROUP_SIZES),
        help="Weights that share a scale, with -q or --recipe  [default: 64, mxfp4 and mxfp8: 32, "
        "nvfp4: 16]",
    )
    mode: str | None = flag(
        "--q-mode",
        type=click.Choice(MODES),
        help="How weights are packed, with -q  [default: affine]",
    )
    recipe: str | None = flag(
        "--recipe",
        metavar="RECIPE",
        help="Quantize with more bits where they matter most: mixed-3-5, mixed-4-5, mixed-4-6, "
        "mixed-6-8, or a .toml file of your own.",
    )
    adapters: bool = flag(
        "--q-adapters",
        is_flag=True,
        help="Quantize a multimodal model's adapters too, to 8 bits, with -q or --recipe.",
    )
    encoders: bool = flag(
        "--q-encoders",
        is_flag=True,
        help="Quantize its image and audio encoders too, to 8 bits, with -q or --recipe.",
    )

    def check(self, method: str | None, others: dict[str, bool]) -> None:
        """Refuse flags that do not go together.

        Args:
            method: of --q-method.
            others: flags that make weights that are not quantized, and whether each is given.
        """
        means = {"-q": self.quantize, "--recipe": self.recipe is not None}
        quantizing = [name for name, given in means.items() if given]
        unquantized = [name for name, given in others.items() if given]
        if quantizing and unquantized:
            raise click.UsageError(
                f"{unquantized[-1]} writes weights that are not quantized: leave {quantizing[0]} "
                "out."
            )
        decided = {"--q-bits": self.bits, "--q-mode": self.mode, "--q-method": method}
        left_open = {
            "--q-group-size": self.group_size,
            "--q-adapters": self.adapters,
            "--q-encoders": self.encoders,
        }
        for name, value in {**decided, **left_open}.items():
            if value and not quantizing:
                raise click.UsageError(f"{name} goes with -q, which quantizes the weights.")
            if value and self.recipe is not None and name in ("--q-bits", "--q-mode"):
                raise click.UsageError(
                    f"{name} and --recipe exclude each other: the recipe says it."
                )

    @property
    def groups(self) -> int | None:
        return None if self.group_size is None else int(self.group_size)

    @property
    def parts(self) -> tuple[str, ...]:
        wanted = {"adapters": self.adapters, "encoders": self.encoders}
        return tuple(part for part, given in wanted.items() if given)

    def quantization(self) -> Quantization | Recipe | str | None:
        """Read what the flags say; None where nothing is quantized."""
        from convert import Quantization, read_recipe

        if self.recipe is not None:
            own = self.recipe.endswith(".toml")
            return read_recipe(Path(self.recipe)) if own else self.recipe
        if not self.quantize:
            return None
        bits = None if self.bits is None else int(self.bits)
        return Quantization.of(self.mode or "affine", bits, self.groups)


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
@flag_group(QuantizationFlags, "quantizing")
@flag_group(CalibrationFlags, "calibrating")
@click.option(
    "--dequantize", "-d", is_flag=True, help="Make unquantized weights of quantized ones."
)
@adapter_option
@click.option(
    "--export",
    type=click.Choice(EXPORTS),
    help="Write another layout than MLX's: hf, as published on the Hub, for transformers; gguf, "
    "one file in half precision for llama.cpp; gguf-q8_0, the same at 8 bits; onnx, a "
    "folder in float32 for ONNX Runtime; onnx-int4, the same at 4 bits.",
)
@click.option(
    "--split-projections",
    is_flag=True,
    help="With --export hf, write q, k, v, gate and up projections apart, for tools that know "
    "Llama's shape.",
)
@click.option(
    "--tokenizer",
    metavar="FOLDER_OR_ID",
    help="Take tokenizer and chat template from another model, such as the one that a GGUF file "
    "was made of.",
)
@click.option(
    "--keep-original",
    is_flag=True,
    help="Where MODEL comes from the Hub, keep it whole in the store.",
)
@flag_group(ReportFlags, "reporting")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Type of what is not quantized  [default: as it is stored, and float16 of what a GGUF "
    "file packs]",
)
@flag_group(PublishFlags, "publishing")
@json_option
def command(
    source: str | None,
    named: str | None,
    out: Path,
    quantizing: QuantizationFlags,
    calibrating: CalibrationFlags,
    dequantize: bool,
    adapter: str | None,
    export: str | None,
    split_projections: bool,
    tokenizer: str | None,
    keep_original: bool,
    reporting: ReportFlags,
    dtype: str | None,
    publishing: PublishFlags,
    as_json: bool,
) -> None:
    """Convert MODEL, an alias, a Hub id, a folder or a GGUF file, to an MLX folder that mlx-lm
    loads too.

    \b
      phimlx convert nano --mlx-path nano-4bit -q
      phimlx convert microsoft/phi-4 --mlx-path phi-4-mixed --recipe mixed-4-6
      phimlx convert phi-4-mixed --mlx-path phi-4-plain --dequantize
      phimlx convert phi-4-Q8_0.gguf --mlx-path phi-4-4bit -q
      phimlx convert --mlx-path phi-4-mixed --upload-repo me/phi-4-mixed

    A model that is not on this machine comes from the Hub, each file converted as it arrives. OUT
    appears when it is complete, and not at all where something goes wrong; a run that was killed
    goes on where it was when it is started again.
    """
    output = Output(json=as_json)
    publishing.check()
    if publishing.upload_repo is not None and source is None and named is None:
        _publish_only(out, publishing, output)
        return
    if (source is None) == (named is None):
        given = "is given twice" if source else "is missing"
        raise click.UsageError(f"MODEL {given}: name one model to convert.")
    quantizing.check(
        calibrating.method, {"--dequantize": dequantize, "--export": export is not None}
    )
    if split_projections and export != "hf":
        raise click.UsageError("--split-projections goes with --export hf.")
    calibration = calibrating.settings()
    if dtype and export not in FOLDERS:
        raise click.UsageError(
            f"--export {export} says the type of the weights: leave --dtype out."
        )
    if reporting.report and export not in FOLDERS:
        raise click.UsageError(f"--report reads model folders: leave it out of --export {export}.")
    if publishing.upload_repo and export not in FOLDERS:
        raise click.UsageError(
            f"--upload-repo publishes model folders: leave it out of --export {export}."
        )
    reporting.check(calibration is not None, calibrating.calibration)
    if adapter is not None:
        _check_adapter(calibration, export, reporting.report)

    from convert import ConversionRequest
    from phimlx.cli.publish import check_target, existing, publish
    from phimlx.cli.report import add_report, read_text
    from phimlx.hub.resolve import resolve

    name = source or named or ""
    if adapter is None and (own := own_adapter(name)) is not None:
        output.note(f"The adapter of {name} is left out; to fuse it: --adapter-path {own}")
    request = ConversionRequest(
        name,
        out,
        quantizing.quantization(),
        dtype,
        dequantize=dequantize,
        group_size=quantizing.groups,
        parts=quantizing.parts,
        layout=export or "mlx",
        split_projections=split_projections,
        calibration=calibration,
        adapter=adapter,
        tokenizer=None if tokenizer is None else resolve(tokenizer, original=True),
    )
    text = read_text(reporting.report_text)
    target = None
    if publishing.upload_repo is not None:
        if os.path.lexists(out):
            raise existing(out, publishing.upload_repo)
        target = check_target(publishing, output)
    whole = {"--report": reporting.report, "--q-method": calibration is not None}
    result = _convert(request, whole, keep_original, publishing.token, output)
    if not as_json:
        print_summary(result, output)
    measured = add_report(result, text, output) if reporting.report else {}
    published = publish(result.path, target, output) if target else {}
    output.json({**as_object(result), **measured, **published})


def _publish_only(out: Path, publishing: PublishFlags, output: Output) -> None:
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
    published = publish(out, check_target(publishing, output), output)
    output.json({"path": str(out), **published})


def _convert(
    request: ConversionRequest,
    whole: dict[str, bool],
    keep_original: bool,
    token: str | None,
    output: Output,
) -> ConversionResult:
    """Convert the model that a request names, from this machine or from the Hub.

    Args:
        whole: flags that need the original whole on this machine, and whether each is given.
    """
    from phimlx.hub.resolve import find_local_gguf, resolve

    name = str(request.source)
    reasons = {
        "--report": "compares with the original",
        "--q-method": "reads the model many times",
    }
    try:
        file = find_local_gguf(name)
        folder = file or resolve(name, original=True)
    except ModelAbsentError as absent:
        for spelled, given in whole.items():
            if given and not keep_original:
                raise click.UsageError(
                    f"{spelled} {reasons[spelled]}, and {name} is not on this machine: add "
                    "--keep-original."
                ) from absent
        return _from_hub(request, keep_original, token, absent, output)
    for spelled, given in whole.items():
        if file is not None and given:
            raise click.UsageError(
                f"{spelled} {reasons[spelled]}, and {name} is a GGUF file: convert it to a folder "
                "first, without -q."
            )
    return _from_folder(replace(request, source=folder), output)


def _from_folder(request: ConversionRequest, output: Output) -> ConversionResult:
    from convert import plan_conversion

    plan: ConversionPlan | GgufPlan | OnnxPlan = plan_conversion(request)
    if plan.calibration is not None:
        return run_calibrated(plan, output)
    with output.progress(plan.bytes_before, "Converting", "B") as bar:
        return plan.run(bar.update)


def _from_hub(
    request: ConversionRequest,
    keep_original: bool,
    token: str | None,
    absent: ModelAbsentError,
    output: Output,
) -> ConversionResult:
    """Convert each weight file as it arrives, or download the whole model first."""
    from huggingface_hub import constants

    from convert import plan_conversion
    from convert.streaming import stream_model
    from phimlx.cli.bars import download_bars, logger
    from phimlx.hub.client import Remote
    from phimlx.hub.download import download

    if constants.HF_HUB_OFFLINE:
        raise absent
    name = str(request.source)
    remote = Remote(token, log=logger(output))
    if keep_original:
        here = download(name, original=True, remote=remote, show_progress=download_bars(output))
        return _from_folder(replace(request, source=here.folder), output)
    with stream_model(name, Path(request.out), remote) as model, _say_what_stays(output):
        plan = plan_conversion(replace(request, source=model.folder), model)
        output.note(
            f"{model.repository.name} is not on this machine: each of its {len(model.shards)} "
            f"weight files ({size_text(model.nbytes)}) is converted as it arrives, and not kept."
        )
        with output.progress(model.nbytes, "Downloading and converting", "B") as bar:
            model.report = bar.update
            return replace(plan.run(), source=Path(model.repository.name))


@contextmanager
def _say_what_stays(output: Output) -> Iterator[None]:
    """Say after an end that is nobody's fault that the work was not for nothing."""
    try:
        yield
    except (DownloadError, KeyboardInterrupt):
        output.note("What has come stays: the same command goes on from there.")
        raise


def _check_adapter(
    calibration: CalibrationSettings | None, export: str | None, report: bool
) -> None:
    """Refuse what needs the fused model as a folder of its own."""
    others = {
        "--q-method": calibration is not None,
        f"--export {export}": export in FILES,
        "--report": report,
    }
    for name, given in others.items():
        if given:
            raise click.UsageError(
                f"--adapter-path does not go with {name}: fuse first, with phimlx fuse, and "
                "convert the fused model."
            )


def as_object(result: ConversionResult) -> dict[str, Any]:
    """Turn a result into what --json prints; remarks where there are any."""
    found = {**asdict(result), "path": str(result.path), "source": str(result.source)}
    return found if result.remarks else {key: found[key] for key in found if key != "remarks"}


def print_summary(result: ConversionResult, output: Output) -> None:
    """Print a result for a person."""
    output.text(
        f"{result.path}: {size_text(result.bytes_after)} from {size_text(result.bytes_before)}, "
        f"{result.bits_per_weight:.2f} bits per weight, {result.tensors} tensors, "
        f"{result.seconds:.1f} s"
    )
    left = result.undivided
    if left:
        layers = counted(
            len(left),
            "layer stays as it is, since groups do not divide its width",
            "layers stay as they are, since groups do not divide their width",
        )
        output.warning(
            f"{layers}: {left[0]}" + (f" and {len(left) - 1} more." if len(left) > 1 else ".")
        )
    for remark in result.remarks:
        output.warning(remark)
    if (result.path / "config.json").is_file():
        output.note(f"Try it: phimlx chat --model {result.path}")
