"""A picture of what `phimlx bench` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phimlx.errors import PhimlxError
from phimlx.evaluation.bench import BenchReport
from phimlx.extras import import_extra
from phimlx.files import replacing, translate_write_errors


def check_plot(path: Path) -> None:
    """Raise PhimlxError where a picture could not be drawn there, before anything is measured."""
    _figure_class()
    if not path.parent.is_dir():
        raise PhimlxError(f"There is no folder {path.parent}.", hint="Make it, or name another.")


def draw_png(report: BenchReport, path: Path) -> None:
    """Write a PNG: decoding and its ceiling, prefill, and the cost of passes.

    Raises:
        PhimlxError: where matplotlib is not installed or the file cannot be written.
    """
    figure = _figure_class()(figsize=(12, 4), layout="constrained")
    figure.suptitle(f"{report.model} in {report.dtype} on {report.device}")
    lengths = [speed.context for speed in report.contexts]
    decode, prefill, cost = figure.subplots(1, 3)
    decode.plot(lengths, [speed.ceiling for speed in report.contexts], "--k", label="at most")
    decode.plot(lengths, [speed.decode for speed in report.contexts], "o-C0", label="phimlx")
    prefill.plot(lengths, [speed.prefill for speed in report.contexts], "o-C0", label="phimlx")
    if any(speed.mlx_lm_decode is not None for speed in report.contexts):
        for axes, name in ((decode, "mlx_lm_decode"), (prefill, "mlx_lm_prefill")):
            theirs = [getattr(speed, name) for speed in report.contexts]
            axes.plot(lengths, theirs, "s-C1", label="mlx-lm")
    if report.pass_cost is not None:
        cost.plot(*zip(*report.pass_cost.points, strict=True), "o-")
    for axes, title, label in (
        (decode, "decoding, tokens a second", "tokens before"),
        (prefill, "prefill, tokens a second", "tokens of the prompt"),
        (cost, "cost of a pass", "tokens"),
    ):
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes is not cost:
            axes.legend(frameon=False)
    with translate_write_errors(path, PhimlxError), replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _figure_class() -> Any:
    without = "A picture of the speeds needs matplotlib, which is not installed."
    return import_extra("matplotlib.figure", "plots", without).Figure
