"""`phimlx prune`: a model with fewer layers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.options import json_option
from phimlx.terminal.output import Output

if TYPE_CHECKING:
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
    required=True,
    type=click.IntRange(min=1),
    help="Decoder layers that stay.",
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
    help="Text to measure layers on, like what the model will read  [default: a short one that "
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
@json_option
def command(
    model: str | None,
    out: Path,
    layers: int,
    method: str,
    calibration: Path | None,
    report_text: Path | None,
    heal: str | None,
    as_json: bool,
) -> None:
    """Leave out the decoder layers of a model that matter least.

    \b
      phimlx prune --model phi-4-mini --layers 24 --mlx-path mini-24-layers
      phimlx prune --model phi-4-mini --layers 24 --mlx-path mini-24-layers --heal chats.jsonl

    What comes out is a model like any other, for phimlx, mlx-lm and transformers; what it has lost
    is shown, and much of that comes back by distillation from the whole model.
    """
    from convert.folder import refuse_existing
    from convert.prune import check_prunable, choose_layers, compare, write_pruned
    from phimlx.checkpoint.folder import Checkpoint
    from phimlx.cli.report import read_text
    from phimlx.cli.train import model_folder
    from phimlx.sizes import size_text

    output = Output(json=as_json)
    texts = [read_text(path) for path in (calibration, report_text or calibration)]
    before = Checkpoint(model_folder(model, output))
    check_prunable(before, layers)
    for path in (out, *(_beside(out) if heal is not None else ())):
        refuse_existing(path)
    with output.progress(100, "Measuring layers", "%") as bar:
        choice = choose_layers(before, layers, method, texts[0], bar.update)
    stored = sum(tensor.nbytes for tensor in before.tensors.values())
    with output.progress(stored, "Writing", "B") as bar:
        nbytes = write_pruned(before, out, choice, bar.update)
    with output.progress(100, "Comparing", "%") as bar:
        found = compare(before, Checkpoint(out), texts[1], bar.update)
    rows = [
        (str(layer), f"{value:.4f}", "stays" if layer in choice.kept else "goes")
        for layer, value in enumerate(choice.importance)
    ]
    output.table(("Layer", method.capitalize(), ""), rows)
    output.text()
    table = [("Weights", size_text(stored), size_text(nbytes))]
    for each in found:
        table += [
            ("Perplexity", f"{each.perplexity_before:.3f}", f"{each.perplexity_after:.3f}"),
            ("KL divergence", "", f"{each.divergence:.3g} nats"),
            ("Same likeliest token", "", f"{each.top1:.2%}"),
        ]
    output.table(("Measure", "Before", "After"), table)
    output.text(f"{out}: {layers} of {len(choice.importance)} layers.")
    healed: dict[str, Any] = {}
    if heal is None:
        whole = model or before.folder
        output.note(f"Make up for it: phimlx distill --teacher {whole} --student {out} --data DATA")
    else:
        healed = {"healed": _heal(before, out, heal, texts[1], as_json)}
    output.json(
        {
            **healed,
            "path": str(out),
            "kept": list(choice.kept),
            "importance": list(choice.importance),
            "bytes_before": stored,
            "bytes_after": nbytes,
            "agreements": [asdict(each) for each in found],
        }
    )


class _Part(Output):
    """Output of a command that is a part of another one, whose result is told by that."""

    def json(self, value: Any) -> None:
        """Nothing."""


def _beside(out: Path) -> tuple[Path, Path]:
    """Name the folders of the run that heals a model, and of what comes of it."""
    return out.with_name(f"{out.name}-adapter"), out.with_name(f"{out.name}-healed")


def _heal(
    before: Checkpoint, out: Path, data: str, text: str | None, as_json: bool
) -> dict[str, Any]:
    """Distill the whole model into the pruned one, and show what that brings back."""
    from convert import convert
    from convert.prune import compare
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
    distill.run(session, False, False, output)
    convert(out, healed, adapter=adapter)
    with output.progress(100, "Comparing", "%") as bar:
        found = compare(before, Checkpoint(healed), text, bar.update)
    table: list[tuple[str, str, str]] = []
    for each in found:
        perplexities = f"{each.perplexity_before:.3f}", f"{each.perplexity_after:.3f}"
        table += [("Perplexity", *perplexities)]
        table += [("KL divergence", "", f"{each.divergence:.3g} nats")]
    output.table(("Measure", "Whole model", "Healed"), table)
    output.text(f"{healed}: the pruned model, healed.")
    return {"path": str(healed), "agreements": [asdict(each) for each in found]}
