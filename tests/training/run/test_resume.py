"""A run that is stopped, killed or out of disk space goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

from phimlx.cli.group import cli
from phimlx.training.data.batches import Batch
from phimlx.training.step import StepResult, TrainingStep
from tests.training.folder import write_rows, write_tiny

ROOT = Path(__file__).parents[3]
# Everything that has a state of its own: moments, a schedule, dropout, epochs, accumulation.
OPTIONS = (
    *("--iters", "12", "--batch-size", "3", "--grad-accumulation-steps", "2"),
    *("--dropout", "0.1", "--learning-rate", "0.01", "--rank", "4"),
    *("--steps-per-report", "2", "--steps-per-eval", "4", "--save-every", "4", "--keep", "2"),
)
ADAPTER, OPTIMIZER = "adapters.safetensors", "optimizer.safetensors"
FILES = (ADAPTER, f"checkpoints/step-0000012/{ADAPTER}", f"checkpoints/step-0000012/{OPTIMIZER}")
TIMES = ("seconds", "left", "tokens_per_second", "peak_memory")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_tiny(folder / "model")
    write_rows(folder / "rows.jsonl")
    whole = train(folder, "whole")
    assert whole.exit_code == 0, whole.output
    return folder


def arguments(place: Path, name: str, *more: str) -> list[str]:
    begin = ["train", "--model", str(place / "model"), "--data", str(place / "rows.jsonl")]
    return [*begin, "--adapter-path", str(place / name), *OPTIONS, *more]


def train(place: Path, name: str, *more: str) -> Result:
    return CliRunner().invoke(cli, arguments(place, name, *more), prog_name="phimlx")


def resume(folder: Path, *more: str) -> Result:
    begin = ["train", "--resume", "--adapter-path", str(folder)]
    return CliRunner().invoke(cli, [*begin, *more], prog_name="phimlx")


def kill(place: Path, name: str, how: str, step: int) -> subprocess.CompletedProcess[str]:
    """Train in a process of its own, which is killed."""
    begin = [sys.executable, "-m", "tests.training.run.killed", how, str(step)]
    return subprocess.run(
        [*begin, *arguments(place, name)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Do something before a step is taken."""
    take = TrainingStep.__call__

    def taken(self: TrainingStep, number: int, batches: Sequence[Batch]) -> StepResult:
        if number == step:
            act()
        return take(self, number, batches)

    monkeypatch.setattr(TrainingStep, "__call__", taken)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMES}
        for line in lines
    ]


def check_same(place: Path, name: str) -> None:
    """Log and arrays are those of the run that nobody stopped, to the last bit."""
    whole, other = place / "whole", place / name
    assert len(rows(whole)) == 6 + 4  # reports and validations
    assert rows(other) == rows(whole)
    for file in FILES:
        expected, found = arrays(whole / file), arrays(other / file)
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            assert mx.array_equal(found[key], array), (file, key)


def arrays(path: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    return loaded


def test_a_run_is_the_same_when_it_is_run_again(place: Path) -> None:
    assert train(place, "again").exit_code == 0
    check_same(place, "again")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "step"), [("SIGKILL", 7), ("saving", 8)])
def test_killed_and_resumed_equals_uninterrupted(place: Path, how: str, step: int) -> None:
    ended = kill(place, how, how, step)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = {"SIGKILL": set(), "saving": {".step-0000008.partial"}}[how]
    assert set(os.listdir(place / how / "checkpoints")) == {"step-0000004", *left}
    result = resume(place / how)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("Going on after step 4 of 12.\n")
    check_same(place, how)
    names = os.listdir(place / how / "checkpoints")
    assert sorted(names) == ["step-0000008", "step-0000012"]


@pytest.mark.parametrize("method", ["kto", "dpo"])
def test_judged_answers_resume_to_the_same_losses(place: Path, method: str) -> None:
    """All weights are trained, so that those from before have to be found again."""
    pairs = [{"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": f"{i} or so"} for i in range(5)]
    data = place / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run = [
        *("train", "--model", str(place / "model"), "--data", str(data), "--method", method),
        *("--fine-tune-type", "full", "--iters", "4", "--batch-size", "3", "--save-every", "2"),
        *("--learning-rate", "0.01", "--steps-per-report", "1", "--valid-fraction", "0"),
    ]
    names = [f"{method}-whole", f"{method}-cut"]
    for name in names:
        begun = CliRunner().invoke(cli, [*run, "--adapter-path", str(place / name)])
        assert begun.exit_code == 0, begun.output
    cut = place / names[1]
    shutil.rmtree(cut / "checkpoints" / "step-0000004")
    about = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps({k: v for k, v in about.items() if k != "ended"}))
    assert resume(cut).exit_code == 0
    assert rows(cut) == rows(place / names[0])
    expected, found = (arrays(place / name / ADAPTER) for name in names)
    assert all(mx.array_equal(found[key], array) for key, array in expected.items())


def test_ended_before_the_first_checkpoint_it_begins_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        at_step(patched, 2, crash)
        assert train(place, "early").exit_code == 1
    assert resume(place / "early").exit_code == 0
    check_same(place, "early")


def cut(file: Path) -> str:
    size = file.stat().st_size
    os.truncate(file, 100)
    return f"{file} has 100 bytes, but {size:,} were written."


def remove(file: Path) -> str:
    file.unlink()
    return f"There is no file {file}."


@pytest.mark.parametrize("damage", [cut, remove])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    place: Path, damage: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise MemoryError

    name = damage.__name__
    with monkeypatch.context() as patched:
        at_step(patched, 10, crash)
        assert train(place, name).exit_code == 1
    newest = place / name / "checkpoints" / "step-0000008"
    reason = damage(newest / OPTIMIZER)
    result = resume(place / name)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[:2] == [
        "Going on after step 4 of 12.",
        f"The checkpoint of step 8 is left out: {reason} The steps after the last whole one are "
        "taken again.",
    ]
    check_same(place, name)


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_interrupted_it_ends_the_step_and_says_how_to_go_on(
    place: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        at_step(patched, 5, lambda: os.kill(os.getpid(), getattr(signal, how)))
        ended = train(place, how)
    assert ended.exit_code == 130
    # Without the extra "plots" the run also says that it draws no picture.
    told = [line for line in ended.stderr.splitlines() if "matplotlib" not in line]
    assert told[-2:] == [
        "Stopping after this step; once more stops at once.",
        f"Stopped after step 5. Go on with: phimlx train --resume --adapter-path {place / how}",
    ]
    saved = place / how / "checkpoints" / "step-0000005"
    assert json.loads((saved / "manifest.json").read_text())["step"] == 5
    assert resume(place / how).exit_code == 0
    check_same(place, how)


def test_a_full_disk_leaves_earlier_checkpoints_whole(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on files stands for the disk: the log stays below it, a checkpoint does not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = (20_000, before[1])
    with monkeypatch.context() as patched:
        at_step(patched, 6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
        try:
            result = train(place, "full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 1
    assert result.stderr.endswith(
        f"Error: The disk is full: {place / 'full'} could not be written.\n"
        "Hint: Free some space, then go on with --resume: earlier checkpoints are whole.\n"
    )
    assert os.listdir(place / "full" / "checkpoints") == ["step-0000004"]
    assert resume(place / "full").exit_code == 0
    check_same(place, "full")


def test_a_complete_run_is_not_gone_on_with(place: Path) -> None:
    result = resume(place / "whole")
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: The run in {place / 'whole'} is complete: it took 12 steps.\n"
        "Hint: Its adapter is there. Choose another --adapter-path for another run.\n"
    )


def test_what_decides_about_losses_cannot_change(place: Path) -> None:
    result = resume(place / "whole", "--batch-size", "4", "--lr-schedule", "linear", "--keep", "9")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: This is another run than the one to go on with: batch_size was 3, is 4; "
        "lr_schedule was 'cosine', is 'linear'.\n"
        "Hint: Leave out what differs, or choose another --adapter-path for a new run.\n"
    )


def test_other_data_is_refused(place: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", 25)
    result = resume(place / "whole", "--data", str(other))
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: The training data is not what the run began with.\n"
        "Hint: Take what the run began with, or choose another --adapter-path for a new run.\n"
    )


def test_another_model_is_refused(place: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 20000.0}))
    result = resume(place / "whole", "--model", str(other))
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: The model is not the one that the run began with.\n"
        "Hint: Take what the run began with, or choose another --adapter-path for a new run.\n"
    )


def test_there_must_be_a_run(tmp_path: Path) -> None:
    result = resume(tmp_path / "nothing")
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {tmp_path / 'nothing'} holds no run to go on with.\n"
        "Hint: Name its folder with --adapter-path, or leave --resume out.\n"
    )
