"""`phimlx prune`: a model with fewer layers, mlp channels or heads."""

from __future__ import annotations

import gc
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.memory import check_memory, ignore_memory_option
from phimlx.cli.options import json_option
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from convert.prune.plan import PruningPlan
    from convert.prune.report import PruneReport
    from phimlx.checkpoint.folder import Checkpoint

METHODS = ("influence", "divergence")


@click.command()
@click.option("--model", metavar="MODEL", help="An alias, a Hub id or a folder.")
@click.option(
    "--mlx-path",
    "out",
    metavar="OUT",
    required=True,
    type=click.Path(path_type=Path),
    help="The folder to make.",
)
@click.option(
    "--layers",
    metavar="N",
    type=click.IntRange(min=1),
    help="Decoder layers that stay.",
)
@click.option(
    "--mlp",
    metavar="FRACTION",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    help="Part of the mlp channels of each layer that stays, as a multiple of 64 of them.",
)
@click.option(
    "--heads",
    metavar="N",
    type=click.IntRange(min=1),
    help="Key/value heads of each layer that stay, with the query heads that read them.",
)
@click.option(
    "--by",
    "method",
    type=click.Choice(METHODS),
    default="influence",
    show_default=True,
    help="Leave out the layers whose output is most like their input (influence), or without which "
    "the model's answers change least (divergence), which takes a pass for every layer.",
)
@click.option(
    "--calibration",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Text to measure on, like what the model will read  [default: a short one that "
    "comes along]",
)
@click.option(
    "--report-text",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Text to measure the result on  [default: as --calibration]",
)
@click.option(
    "--heal",
    metavar="DATA",
    help="Then teach the pruned model what the whole one knows, by phimlx distill on this data: "
    "OUT-adapter gets that run, OUT-healed the model.",
)
@ignore_memory_option
@json_option
def command(
    model: str | None,
    out: Path,
    layers: int | None,
    mlp: float | None,
    heads: int | None,
    method: str,
    calibration: Path | None,
    report_text: Path | None,
    heal: str | None,
    ignore_memory: bool,
    as_json: bool,
) -> None:
    """Leave out what matters least: decoder layers, mlp channels, key/value heads.

    \b
      phimlx prune --model phi-4-mini --layers 24 --mlp 0.75 --mlx-path smaller
      phimlx prune --model phi-4-mini --layers 24 --mlx-path mini-24-layers --heal chats.jsonl

    What comes out is a model like any other, for phimlx, mlx-lm and transformers; what it has lost
    is shown, and much of that comes back by distillation from the whole model.
    """
    from convert.folder import refuse_existing
    from convert.prune.plan import PruningPlan
    from convert.prune.report import PruneReport, compare
    from convert.prune.write import write_pruned
    from phimlx.checkpoint.folder import Checkpoint
    from phimlx.cli.report import read_text
    from phimlx.cli.train import model_folder

    widths = {"mlp": mlp, "heads": heads}
    wanted = {name: amount for name, amount in widths.items() if amount is not None}
    if layers is None and not wanted:
        raise click.UsageError("Say what is to stay: --layers, --mlp or --heads, or several.")
    output = Output(json=as_json)
    texts = [read_text(path) for path in (calibration, report_text or calibration)]
    before = Checkpoint(model_folder(model, output))
    plan = PruningPlan.of(before, layers, wanted, method)
    for path in (out, *(_beside(out) if heal is not None else ())):
        refuse_existing(path)
    if plan.warning is not None:
        output.warning(plan.warning)
    _forecast(plan, ignore_memory, output)
    with output.progress(100, "Measuring", "%") as bar:
        pruning = plan.choose(texts[0], bar.update)
    stored = sum(tensor.nbytes for tensor in before.tensors.values())
    with output.progress(stored, "Writing", "B") as bar:
        nbytes = write_pruned(before, out, pruning, bar.update, plan.split)
    after = Checkpoint(out)
    with output.progress(100, "Comparing", "%") as bar:
        found = compare(before, after, texts[1], bar.update)
    speeds = _speeds(before, after, output)
    report = PruneReport(out, pruning, stored, nbytes, found, speeds)
    output.table(*report.layer_rows())
    output.text()
    output.table(("Measure", "Before", "After"), report.rows())
    output.text(f"{out}: {report.summary}.")
    _draw(report, output)
    healed: dict[str, Any] = {}
    if heal is None:
        whole = model or before.folder
        output.note(f"Make up for it: phimlx distill --teacher {whole} --student {out} --data DATA")
    else:
        healed = {"healed": _heal(before, out, heal, texts[1], plan.split, ignore_memory, as_json)}
    output.json({**healed, **report.as_object()})


def _forecast(plan: PruningPlan, ignore_memory: bool, output: Output) -> None:
    """Say what the work will take, and refuse what this machine does not have."""
    from convert.prune.memory import check_memory as check
    from convert.prune.memory import forecast
    from phimlx.machine.memory import machine_memory
    from phimlx.sizes import size_text

    memory = machine_memory()
    needed = max(forecast(plan).values())
    output.note(f"Takes about {size_text(needed)} of this machine's {size_text(memory)} of memory.")
    check_memory(lambda: check(plan, memory), ignore_memory, output)


def _speeds(before: Checkpoint, after: Checkpoint, output: Output) -> tuple[float, float] | None:
    """Measure tokens a second of both, one after the other; None where the larger has no room."""
    from phimlx.evaluation.bench import decoding_speed
    from phimlx.machine.memory import machine_memory

    stored = sum(tensor.nbytes for tensor in before.tensors.values())
    if stored > machine_memory():
        output.note("Speeds were not measured: the whole model does not fit into the memory.")
        return None
    with output.progress(2, "Timing", " models") as bar:
        first = decoding_speed(before.folder)
        gc.collect()  # lets go of the whole model before the other is loaded
        bar.update(1)
        second = decoding_speed(after.folder)
        bar.update(1)
    return None if first is None or second is None else (first, second)


def _draw(report: PruneReport, output: Output) -> None:
    """Put the picture into the folder, where there is what draws it."""
    from convert.prune.report import PICTURE
    from phimlx.errors import PhimlxError

    try:
        report.draw(report.out / PICTURE)
    except PhimlxError as error:  # the numbers are there all the same
        output.note(f"{error} {error.hint or ''}".rstrip())
    else:
        output.note(f"Drawn in {report.out / PICTURE}.")


class _Part(Output):
    """Output of a command that is a part of another one, whose result is told by that."""

    def json(self, value: Any) -> None:
        """Nothing."""


def _beside(out: Path) -> tuple[Path, Path]:
    """Name the folders of the run that heals a model, and of what comes of it."""
    return out.with_name(f"{out.name}-adapter"), out.with_name(f"{out.name}-healed")


def _heal(
    before: Checkpoint,
    out: Path,
    data: str,
    text: str | None,
    split: bool,
    ignore_memory: bool,
    as_json: bool,
) -> dict[str, Any]:
    """Distill the whole model into the pruned one, and show what that brings back."""
    from convert import convert
    from convert.prune.report import agreement_rows, compare
    from phimlx.checkpoint.folder import Checkpoint
    from phimlx.cli import distill
    from phimlx.training.distill.settings import DistillSettings

    adapter, healed = _beside(out)
    output = _Part(json=as_json)
    settings = DistillSettings(
        teacher=str(before.folder), model=str(out), data=data, adapter_path=str(adapter)
    )
    session = distill.open_session(settings, False, output)
    session.check()
    distill.run(session, False, ignore_memory, output)
    layout = "hf" if split else "mlx"
    convert(out, healed, adapter=adapter, layout=layout, split_projections=split)
    with output.progress(100, "Comparing", "%") as bar:
        found = compare(before, Checkpoint(healed), text, bar.update)
    output.table(("Measure", "Whole model", "Healed"), agreement_rows(found))
    output.text(f"{healed}: the pruned model, healed.")
    return {"path": str(healed), "agreements": [asdict(each) for each in found]}
