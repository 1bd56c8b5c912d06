"""A picture of a run's losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from phimlx.errors import TrainingError
from phimlx.extras import import_extra
from phimlx.files import replacing
from phimlx.training.run.checkpoints import writing
from phimlx.training.run.log import Curve


def draw_png(curves: Mapping[str, Curve], path: Path) -> None:
    """Write a PNG of the losses.

    Raises:
        TrainingError: where matplotlib is not installed or the file cannot be written.
    """
    without = "A picture of the loss needs matplotlib, which is not installed."
    module = import_extra("matplotlib.figure", "plots", without, TrainingError)
    figure = module.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for (name, curve), marker in zip(curves.items(), ("", "o"), strict=True):
        if curve:
            axes.plot(*zip(*curve, strict=True), marker=marker, markersize=4, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with writing(path), replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
