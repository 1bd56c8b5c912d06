"""The log, the curve in both its forms, and trackers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from phimlx.errors import TrainingError
from phimlx.terminal.curves import draw, legend
from phimlx.training.run.events import StepTaken, TrainingReport, Validation
from phimlx.training.run.log import TrainingLog, row_of
from phimlx.training.run.loss_plot import draw_png
from phimlx.training.run.trackers import check_trackers, numbers_of, open_tracker
from phimlx.training.step import StepResult

REPORT = TrainingReport(10, 0.5, 2.0, {"margin": 1.5}, 3.0, 1e-4, 640, 99.0, 1 << 20, 6.5, 7.0)
VALIDATION = Validation(10, 1.75, {}, 64, True, 0.5)


def row(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss}


def test_a_line_for_each_report(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "deep" / "log.jsonl")
    for event in (REPORT, VALIDATION):
        found = row_of(event)
        assert found is not None
        log.add(found)
    lines = (tmp_path / "deep" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "kind": "train",
            "step": 10,
            "epoch": 0.5,
            "loss": 2.0,
            "metrics": {"margin": 1.5},
            "gradient_norm": 3.0,
            "learning_rate": 1e-4,
            "tokens": 640,
            "tokens_per_second": 99.0,
            "peak_memory": 1 << 20,
            "seconds": 6.5,
            "left": 7.0,
        },
        {
            "kind": "validation",
            "step": 10,
            "loss": 1.75,
            "metrics": {},
            "tokens": 64,
            "best": True,
            "seconds": 0.5,
        },
    ]
    assert log.curves() == {"train": [(10, 2.0)], "validation": [(10, 1.75)]}
    assert row_of(StepTaken(1, StepResult(1.0, 1, 1, 1, 1.0, {}))) is None


def test_a_resumed_run_takes_out_what_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = [json.dumps(row(step)) for step in (2, 4, 6)]
    path.write_text("\n".join(whole) + '\n{"kind": "train", "step": 8, "lo')
    log = TrainingLog(path, 4, resumed=True)
    log.add(row(5))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 5]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dear diary", "is not JSON (line 1, column 1: Expecting value)."),
        ('{"kind": "train"}', "is no row of a run's log."),
    ],
)
def test_a_damaged_line_is_named_and_nothing_is_taken_out(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "log.jsonl"
    text = f"{json.dumps(row(2))}\n{line}\n{json.dumps(row(4))}\n"
    path.write_text(text)
    with pytest.raises(TrainingError) as error:
        TrainingLog(path, 4, resumed=True)
    assert str(error.value) == f"{path}, line 2 {message}"
    assert path.read_text() == text


def test_a_log_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("dear diary")
    with pytest.raises(TrainingError) as error:
        TrainingLog(path)
    assert str(error.value) == f"{path} exists already."
    assert error.value.hint == "Choose another --log, or remove it first."
    assert path.read_text() == "dear diary"


def test_the_curve_in_characters() -> None:
    line = [(1, 4.0), (3, 2.0), (5, 1.0)]
    assert draw(line, [(0, 4.0), (5, 2.0)], width=20, height=5).splitlines() == [
        "4 ┤●  ⠈⠢⢄",
        "  ┤      ⠑⠢⡀",
        "  ┤        ⠈⠑⠤⣀    ●",
        "1 ┤            ⠉⠑⠒⠤⣀",
        "   0               5",
    ]
    assert draw([(1, 2.0)], []) == ""
    assert legend({"train": line, "validation": line}) == "loss: ⠒ train, ● validation"
    assert legend({"train": line, "validation": []}) == "loss"


def test_the_curve_as_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "curve.png"
    draw_png({"train": [(1, 2.0), (2, 1.0)], "validation": [(2, 1.5)]}, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [each.name for each in tmp_path.iterdir()] == ["curve.png"]


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TrainingError) as error:
        draw_png({"train": [], "validation": []}, tmp_path / "curve.png")
    assert str(error.value) == "A picture of the loss needs matplotlib, which is not installed."
    assert error.value.hint == "Install it with: pip install 'phimlx[plots]'"


@pytest.mark.parametrize("name", ["wandb", "swanlab", "tensorboard"])
def test_a_tracker_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrainingError) as error:
        check_trackers([name])
    assert str(error.value) == f"Reporting to {name} needs a package that is not installed."
    assert error.value.hint == f"Install it with: pip install 'phimlx[{name}]'"


def test_what_trackers_get() -> None:
    found = row_of(REPORT)
    assert found is not None
    numbers = numbers_of(found)
    assert numbers["train/loss"] == 2.0
    assert numbers["train/margin"] == 1.5
    assert "train/step" not in numbers
    assert "train/metrics" not in numbers


class Module:
    """What wandb and swanlab have in common."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def init(self, **options: Any) -> Module:
        self.said.append(options["project"])
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.said.append((step, values))

    def finish(self) -> None:
        self.said.append("finished")


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_trackers_are_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module()
    monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    tracker = open_tracker(name, tmp_path, {"rank": 8})
    tracker.add(3, {"train/loss": 1.0})
    tracker.close()
    assert module.said == ["phimlx", (3, {"train/loss": 1.0}), "finished"]


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = open_tracker("tensorboard", tmp_path, {})
    tracker.add(3, {"train/loss": 1.5})
    tracker.close()
    accumulators = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("train/loss")] == [(3, 1.5)]
