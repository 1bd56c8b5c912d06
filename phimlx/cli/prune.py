"""`phimlx prune`: a model with fewer layers, mlp channels or heads."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

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

    What comes out is a folder like any other, which mlx-lm and transformers load as they do the
    whole model. Where one of them will not, that is said first: so it is with fewer heads of
    phi-4-mini or phi-2, and with models that see or hear. What the model has lost is shown, and
    much of that comes back by distillation from the whole one.
    """
    from convert.folder import refuse_existing
    from convert.prune.plan import PruningPlan
    from convert.prune.report import PruneReport, compare, report_tokens
    from convert.prune.write import write_pruned
    from phimlx.checkpoint.folder import Checkpoint
    from phimlx.cli.healing import Healing
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
    healing = None if heal is None else Healing(before, out, heal, plan.split)
    for path in (out, *(() if healing is None else healing.folders)):
        refuse_existing(path)
    tokens = report_tokens(before, texts[1])
    if plan.lost.warning is not None:
        output.warning(plan.lost.warning)
    if plan.note is not None:
        output.note(plan.note)
    _forecast(plan, ignore_memory, output)
    if healing is not None:
        healing.check(output)
    with output.progress(100, "Measuring", "%") as bar:
        pruning = plan.choose(texts[0], bar.update)
    stored = sum(tensor.nbytes for tensor in before.tensors.values())
    with output.progress(stored, "Writing", "B") as bar:
        nbytes = write_pruned(before, out, pruning, bar.update, plan.split)
    after = Checkpoint(out)
    with output.progress(100, "Comparing", "%") as bar:
        found = compare(before, after, tokens, bar.update)
    speeds = _speeds(before, after, output)
    report = PruneReport(out, pruning, stored, nbytes, found, speeds, plan.lost.programs)
    output.table(*report.layer_rows())
    output.text()
    output.table(("Measure", "Before", "After"), report.rows())
    output.text(f"{out}: {report.summary}.")
    _draw(report, output)
    if healing is None:
        whole = model or before.folder
        output.note(f"Make up for it: phimlx distill --teacher {whole} --student {out} --data DATA")
        output.json(report.as_object())
    else:
        output.json({"healed": healing.run(tokens, ignore_memory, output), **report.as_object()})


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
