"""What a run has reported: a line of JSON each, a picture of the loss, and other trackers.

Knows reports as data; knows nothing of how they came about.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from phimlx.errors import TrainingError
from phimlx.extras import import_extra
from phimlx.files import replacing, write_file
from phimlx.training.run.checkpoints import writing
from phimlx.training.run.events import Event, Report, Sample, Validation

KINDS: dict[type[Any], str] = {Report: "train", Validation: "validation", Sample: "sample"}
"""What is kept, and what it is called there."""

Row = dict[str, Any]
Curve = Sequence[tuple[int, float]]
"""Steps and losses."""


def row_of(event: Event) -> Row | None:
    """An event as it is logged; None for one that is not."""
    kind = KINDS.get(type(event))
    return None if kind is None else {"kind": kind, **asdict(event)}


class Log:
    """A file of rows, each on the disk before the next thing happens.

    Args:
        step: rows after this one are taken out: a resumed run will write them again.
    """

    def __init__(self, path: Path, step: int = 0, resumed: bool = False) -> None:
        self.path = path
        self.rows: list[Row] = []
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if resumed and path.exists():
                self.rows = [row for row in _rows(path) if row["step"] <= step]
                # Of a run that has taken no step yet nothing was kept.
                self.rows = self.rows if step else []
                write_file(path, "".join(map(_line, self.rows)))
            elif path.exists():
                raise TrainingError(
                    f"{path} exists already.", hint="Choose another --log, or remove it first."
                )

    def add(self, row: Row) -> None:
        """Append a row; raises TrainingError where it cannot be written."""
        self.rows.append(row)
        line = _line(row).encode()
        with writing(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                before = os.fstat(descriptor).st_size
                try:
                    if os.write(descriptor, line) < len(line):
                        os.write(descriptor, line[os.fstat(descriptor).st_size - before :])
                except OSError:
                    os.ftruncate(descriptor, before)  # no half lines
                    raise
            finally:
                os.close(descriptor)

    def curves(self) -> dict[str, Curve]:
        """Training and validation loss."""
        return {
            kind: [(row["step"], row["loss"]) for row in self.rows if row["kind"] == kind]
            for kind in ("train", "validation")
        }


class Sink(Protocol):
    """A tracker that takes numbers by name."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take what was measured at a step."""

    def close(self) -> None:
        """End: everything is handed over."""


class _Wandb:
    def __init__(self, module: Any, folder: Path, settings: Mapping[str, Any]) -> None:
        self.run = module.init(project="phimlx", dir=str(folder), config=dict(settings))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class _Swanlab:
    def __init__(self, module: Any, folder: Path, settings: Mapping[str, Any]) -> None:
        self.module = module
        module.init(project="phimlx", logdir=str(folder / "swanlab"), config=dict(settings))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


class _Tensorboard:
    """Event files, through what the tensorboard package itself writes them with."""

    def __init__(self, module: Any, folder: Path, settings: Mapping[str, Any]) -> None:
        events = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self.protos = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self.summaries = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self.writer = events.EventFileWriter(str(folder / "tensorboard"))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        found = [
            self.summaries.Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
        ]
        summary = self.summaries.Summary(value=found)
        self.writer.add_event(self.protos.Event(step=step, summary=summary))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


SINKS: dict[str, Callable[[Any, Path, Mapping[str, Any]], Sink]] = {
    "wandb": _Wandb,
    "swanlab": _Swanlab,
    "tensorboard": _Tensorboard,
}


def check_sinks(names: Sequence[str]) -> None:
    """Raise TrainingError where a tracker is not installed, before anything is loaded for it."""
    for name in names:
        _tracker(name)


def open_sink(name: str, folder: Path, settings: Mapping[str, Any]) -> Sink:
    """A tracker by name; raises TrainingError where it is not installed."""
    return SINKS[name](_tracker(name), folder, settings)


def _tracker(name: str) -> Any:
    without = f"Reporting to {name} needs a package that is not installed."
    return import_extra(name, name, without, TrainingError)


def numbers_of(row: Row) -> dict[str, float]:
    """What of a row a tracker takes."""
    flat = {**row, **row.get("metrics", {})}
    return {
        f"{row['kind']}/{name}": value
        for name, value in flat.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


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


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _rows(path: Path) -> list[Row]:
    """The rows of a file; what a killed run left half written at its end does not count."""
    found = []
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                found.append(row)
    return found
