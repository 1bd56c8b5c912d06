"""Trackers of other makers that a run reports to: Weights & Biases, SwanLab, TensorBoard."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from phimlx.errors import TrainingError
from phimlx.extras import import_extra
from phimlx.training.run.log import Row


class Tracker(Protocol):
    """Takes numbers by name."""

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


TRACKERS: dict[str, Callable[[Any, Path, Mapping[str, Any]], Tracker]] = {
    "wandb": _Wandb,
    "swanlab": _Swanlab,
    "tensorboard": _Tensorboard,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise TrainingError where a tracker is not installed, before anything is loaded for it."""
    for name in names:
        _package(name)


def open_tracker(name: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    """Open a tracker by name; raises TrainingError where it is not installed."""
    return TRACKERS[name](_package(name), folder, settings)


def _package(name: str) -> Any:
    without = f"Reporting to {name} needs a package that is not installed."
    return import_extra(name, name, without, TrainingError)


def numbers_of(row: Row) -> dict[str, float]:
    """Return what a tracker takes of a row of the log."""
    flat = {**row, **row.get("metrics", {})}
    return {
        f"{row['kind']}/{name}": value
        for name, value in flat.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
