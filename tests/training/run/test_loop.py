"""The loop: what it reports, keeps and answers, when it ends, and whom it blames."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phimlx.errors import TrainingError
from phimlx.machine.processes import ProcessGroup
from phimlx.training.data.batches import Batches, Example
from phimlx.training.run.checkpoints import RunFolder
from phimlx.training.run.events import (
    CheckpointSaved,
    Event,
    SampleReply,
    TrainingReport,
    Validation,
)
from phimlx.training.run.loop import (
    COMPLETE,
    STOPPED_EARLY,
    TrainingPlan,
    TrainingRun,
    make_batches,
    make_step,
)
from phimlx.training.settings import TrainSettings
from phimlx.training.sharded import whole_shapes
from phimlx.training.step import NonFiniteError
from phimlx.training.trainable import attach
from tests.training.models import tiny


def examples(count: int = 12, seed: int = 0) -> list[Example]:
    random = np.random.default_rng(seed)
    return [
        Example(
            random.integers(0, 300, 9).astype(np.int32), np.ones(9, bool), f"rows.jsonl, line {i}"
        )
        for i in range(1, count + 1)
    ]


def make(folder: Path, rate: float = 1e-2, **options: Any) -> TrainingRun:
    settings = TrainSettings(batch_size=4, steps_per_report=2, **options)
    model = tiny()
    attach(model, TrainSettings(rank=4, alpha=8.0))
    processes = ProcessGroup()
    run_folder = RunFolder(folder, settings.keep)
    folder.mkdir()
    run_folder.begin({}, {"fine_tune_type": "lora"})
    step = make_step(model, optim.Adam(rate), settings, processes)
    train = make_batches(examples(), settings, processes)
    valid = make_batches(examples(6, seed=1), settings, processes, shuffled=False)
    return TrainingRun(step, train, valid, settings, run_folder, processes)


def test_a_run_reports_validates_and_keeps(tmp_path: Path) -> None:
    run, events = make(tmp_path / "run", epochs=3, steps_per_eval=3, keep=1), list[Event]()
    assert run.plan == TrainingPlan(steps=9, per_epoch=3, eval_every=3, save_every=3)
    outcome = run.fit(events.append)
    reports = [event for event in events if isinstance(event, TrainingReport)]
    validations = [event for event in events if isinstance(event, Validation)]
    assert [report.step for report in reports] == [2, 4, 6, 8, 9]
    assert reports[-1].epoch == 3.0
    assert reports[0].tokens == 2 * 4 * 8
    assert [each.step for each in validations] == [0, 3, 6, 9]
    assert {each.tokens for each in validations} == {6 * 8}
    best = min(validations[1:], key=lambda each: each.loss)
    assert (outcome.ending, outcome.step) == (COMPLETE, 9)
    assert (outcome.best_step, outcome.best_loss) == (best.step, best.loss)
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [3, 6, 9]
    kept = {saved.step for saved in run.run_folder.checkpoints()}
    assert kept == {9, best.step}
    whole = mx.load(str(tmp_path / "run" / "adapters.safetensors"))
    saved = next(each for each in run.run_folder.checkpoints() if each.step == best.step)
    trees = run.step.model.trainable_parameters(), run.step.optimizer.state
    weights, optimizer = (whole_shapes(tree, {}) for tree in trees)
    of_best = run.run_folder.load(saved, weights, optimizer, ProcessGroup())[0]
    assert all(mx.array_equal(whole[name], array) for name, array in of_best.items())


def test_validation_is_the_mean_over_tokens(tmp_path: Path) -> None:
    run = make(tmp_path / "run", iters=1)
    events: list[Event] = []
    run.fit(events.append)
    first = next(event for event in events if isinstance(event, Validation))
    model = tiny()
    losses = [
        -mx.take_along_axis(
            mx.log(mx.softmax(model(mx.array(each.tokens[None, :-1]))[0], axis=-1)),
            mx.array(each.tokens[1:, None]),
            axis=-1,
        )
        for each in examples(6, seed=1)
    ]
    assert first.loss == pytest.approx(float(mx.concatenate(losses).mean()), rel=1e-5)


def test_it_stops_early_where_nothing_gets_better(tmp_path: Path) -> None:
    """What is drawn at random cannot be validated on: learning it by heart makes it worse."""
    run = make(tmp_path / "run", rate=0.05, iters=60, steps_per_eval=2, early_stop=3)
    outcome = run.fit(lambda event: None)
    assert outcome.ending == STOPPED_EARLY
    assert outcome.best_step is not None
    assert outcome.step == outcome.best_step + 3 * 2
    last = run.run_folder.checkpoints()[-1]
    assert last.state["ending"] == STOPPED_EARLY


def test_the_row_that_makes_no_number_is_named_and_checkpoints_stay(tmp_path: Path) -> None:
    run = make(tmp_path / "run", iters=6, save_every=1, steps_per_eval=6)
    model = run.step.model
    poisoned = examples()[4]
    weight = np.array(model.model.embed_tokens.weight)

    def poison(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == 2:
            weight[poisoned.tokens[0]] = np.nan
            model.model.embed_tokens.weight = mx.array(weight)

    with pytest.raises(NonFiniteError) as error:
        run.fit(poison)
    assert "rows.jsonl, line" in str(error.value)
    assert [saved.step for saved in run.run_folder.checkpoints()][-1] >= 2
    trained = dict(tree_flatten(model.trainable_parameters())).values()
    assert all(mx.isfinite(array).all() for array in trained)


def test_answers_come_after_each_validation(tmp_path: Path) -> None:
    run = make(tmp_path / "run", iters=2, steps_per_eval=2)

    def answer(step: int) -> Iterator[SampleReply]:
        yield SampleReply(step, "rows.jsonl, line 1", "2 + 2", "4", "5")

    run.sample_replies = answer
    events: list[Event] = []
    run.fit(events.append)
    kinds = [type(event).__name__ for event in events]
    assert kinds == [
        *("Validation", "SampleReply", "StepTaken", "StepTaken"),
        *("TrainingReport", "Validation", "SampleReply", "CheckpointSaved"),
    ]


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    run_folder = RunFolder(tmp_path / "run", 1)
    with (
        run_folder.locked(),
        pytest.raises(TrainingError) as error,
        RunFolder(tmp_path / "run", 1).locked(),
    ):
        pass
    assert str(error.value) == f"Another run is writing to {tmp_path / 'run'}."
    assert error.value.hint == "Wait for it, stop it, or choose another --adapter-path."


def test_half_a_checkpoint_does_not_count(tmp_path: Path) -> None:
    run = make(tmp_path / "run", iters=4, save_every=2, steps_per_eval=4)
    run.fit(lambda event: None)
    *_, before, last = run.run_folder.checkpoints()
    (last.folder / "optimizer.safetensors").write_bytes(b"half")
    assert run.run_folder.checkpoints()[-1] == before
    (damaged,) = run.run_folder.damaged(before.step)
    assert damaged.step == last.step
    size = last.folder / "optimizer.safetensors"
    assert damaged.reason.startswith(f"{size} has 4 bytes, but ")
    manifest = json.loads((before.folder / "manifest.json").read_text())
    (before.folder / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))
    assert before not in run.run_folder.checkpoints()


def test_steps_are_told_from_epochs() -> None:
    def plan(batches: int, **options: Any) -> tuple[int, int]:
        found = TrainingPlan.of(TrainSettings(**options), batches)
        return found.steps, found.per_epoch

    assert plan(10) == (30, 10)
    assert plan(10, grad_accumulation_steps=4) == (9, 3)
    assert plan(10, epochs=0.5) == (5, 10)
    assert plan(10, iters=7) == (7, 10)
    assert isinstance(make_batches(examples(), TrainSettings(), ProcessGroup()), Batches)
