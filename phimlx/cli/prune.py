"""`phimlx prune`: a model with fewer layers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from phimlx.cli.options import json_option
from phimlx.terminal.output import Output

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
@json_option
def command(
    model: str | None,
    out: Path,
    layers: int,
    method: str,
    calibration: Path | None,
    report_text: Path | None,
    as_json: bool,
) -> None:
    """Leave out the decoder layers of a model that matter least.

    \b
      phimlx prune --model phi-4-mini --layers 24 --mlx-path mini-24-layers
      phimlx distill --teacher phi-4-mini --student mini-24-layers --data chats.jsonl

    What comes out is a model like any other, for phimlx, mlx-lm and transformers; what it has lost
    is shown, and much of that comes back by distillation from the whole model.
    """
    from convert.prune import check_prunable, choose_layers, compare, write_pruned
    from phimlx.checkpoint.folder import Checkpoint
    from phimlx.cli.report import read_text
    from phimlx.cli.train import model_folder
    from phimlx.sizes import size_text

    output = Output(json=as_json)
    texts = [read_text(path) for path in (calibration, report_text or calibration)]
    before = Checkpoint(model_folder(model, output))
    check_prunable(before, layers)
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
    output.note(
        f"Make up for it: phimlx distill --teacher {model or before.folder} --student {out}"
    )
    output.json(
        {
            "path": str(out),
            "kept": list(choice.kept),
            "importance": list(choice.importance),
            "bytes_before": stored,
            "bytes_after": nbytes,
            "agreements": [asdict(each) for each in found],
        }
    )
