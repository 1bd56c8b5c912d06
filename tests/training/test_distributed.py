"""Two processes under `mlx.launch` train as one does, and one's death ends the run in order."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Timer
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile  # type: ignore[import-untyped]
from click.testing import CliRunner
from PIL import Image

from phimlx.cli.group import cli
from phimlx.machine import processes
from tests.everything import everything
from tests.multimodal import multimodal_folder
from tests.training.folder import write_rows, write_tiny

ROOT = Path(__file__).parents[2]
LAUNCH = Path(sys.executable).parent / "mlx.launch"
OPTIONS = (
    *("--iters", "6", "--batch-size", "4", "--grad-accumulation-steps", "2", "--rank", "4"),
    *("--learning-rate", "0.01", "--steps-per-report", "1", "--steps-per-eval", "3"),
)
PACKED = ("--pack", "--max-seq-length", "64")
REWARDS = (
    *("--method", "grpo", "--reward", "regex:.*[aeiou]{2}.*", "--reward", "length:4"),
    *("--group-size", "4", "--max-tokens", "8", "--learning-rate", "0.001"),
)


def write_place(folder: Path) -> Path:
    """Write a tiny model, rows and pairs into a folder."""
    write_tiny(folder / "model")
    write_rows(folder / "rows.jsonl", 26)
    pairs = [
        {"prompt": f"Say {i}.", "chosen": f"{i} is it", "rejected": "so " * (1 + i % 5)}
        for i in range(13)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("machines"))


@pytest.fixture(scope="module")
def senses(data: Path, place: Path) -> Path:
    """The same with a model that sees and hears, and rows with sounds, texts and a picture."""
    folder = place / "senses"
    (folder / "model").mkdir(parents=True)
    multimodal_folder(data, folder / "model")
    noise = np.random.default_rng(5)
    Image.fromarray(noise.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / "a.png")
    rows: list[dict[str, Any]] = [{"image": "a.png", "prompt": "What?", "completion": "That."}]
    for number in range(8):
        sound = noise.normal(0, 0.2, 3000 + 900 * number).astype(np.float32)
        soundfile.write(folder / f"{number}.wav", sound, 16000)
        rows.append(
            {"audio": f"{number}.wav", "prompt": "Say it.", "completion": f"it is {number}"}
        )
        rows.append({"prompt": f"{number}?", "completion": "!" * (1 + number)})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(place: Path, name: str, data: str, *more: str) -> list[str]:
    begin = ["train", "--model", str(place / "model"), "--data", str(place / data)]
    return [*begin, "--adapter-path", str(place / name), *OPTIONS, *more]


def alone(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.training.run.killed", "never", "0", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def together(arguments: list[str], *how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        launched(arguments, *how), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def two_free_ports() -> int:
    """The first of two free ports, one after the other."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def launched(arguments: list[str], *how: str) -> list[str]:
    """The command that starts two processes, each on a free port."""
    port = two_free_ports()
    launch = [str(LAUNCH), "-n", "2", "--backend", "ring", "--starting-port", str(port), "--cwd"]
    run = [sys.executable, "-m", "tests.training.run.killed", *(how or ("never", "0")), *arguments]
    return [*launch, str(ROOT), "--", *run]


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[tuple[str, int], float]]:
    """What was reported at which step, and its loss."""
    return [((row["kind"], row["step"]), row["loss"]) for row in log(folder) if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data", "more"),
    [
        ("plain", "rows.jsonl", ()),
        pytest.param("packed", "rows.jsonl", PACKED, marks=everything),
        ("preferences", "pairs.jsonl", ("--dpo",)),
        pytest.param("answers", "pairs.jsonl", ("--method", "kto"), marks=everything),
        ("rewards", "rows.jsonl", REWARDS),
    ],
)
def test_losses_are_those_of_one_process(
    place: Path, name: str, data: str, more: tuple[str, ...]
) -> None:
    one = alone(arguments(place, f"{name}-1", data, *more))
    assert one.returncode == 0, one.stderr
    two = together(arguments(place, f"{name}-2", data, *more))
    assert two.returncode == 0, two.stderr
    check_alike(place / f"{name}-1", place / f"{name}-2")


def check_alike(one: Path, two: Path) -> None:
    """Compare the losses of a process with those of two, and what lies in their folders."""
    expected, found = losses(one), losses(two)
    assert len(expected) >= 6  # four steps, two validations or more
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (_, loss), (_, wanted) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-5, abs=1e-6)  # of grpo sums near 0
    # The first alone writes and prints.
    names = sorted(path.name for path in two.iterdir())
    assert names == sorted(path.name for path in one.iterdir())


@pytest.mark.slow
def test_pictures_and_sounds_are_shared_and_their_features_computed_once(
    senses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):  # where the store is
        monkeypatch.setenv(name, str(tmp_path))
    more = (
        *("--train", "vision-adapter,speech-adapter,new", "--max-seq-length", "1024"),
        *("--iters", "4", "--grad-accumulation-steps", "1"),
    )
    two = together(arguments(senses, "two", "rows.jsonl", *more))
    assert two.returncode == 0, two.stderr
    kept = {path: path.stat().st_ino for path in tmp_path.rglob("*.safetensors")}
    assert len(kept) == 9
    one = CliRunner().invoke(cli, arguments(senses, "one", "rows.jsonl", *more))
    assert one.exit_code == 0, one.output
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*.safetensors")} == kept
    check_alike(senses / "one", senses / "two")


@pytest.mark.slow
def test_a_lost_machine_ends_the_run_with_what_was_learned(place: Path) -> None:
    lost = together(arguments(place, "lost", "rows.jsonl"), "SIGKILL@1", "5")
    assert "Another of the 2 machines is lost, so the run ends here" in lost.stderr + lost.stdout
    # Weights and optimizer are those of the last step that was whole, and go on from there.
    kept = sorted(path.name for path in (place / "lost" / "checkpoints").iterdir())
    assert kept[-1] == "step-0000004"
    together(["train", "--resume", "--adapter-path", str(place / "lost")])
    assert dict(losses(place / "lost")) == dict(losses(place / "plain-2"))


def test_a_machine_that_has_stopped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.05)
    lost: SimpleQueue[Exception] = SimpleQueue()
    watchdog = processes.Watchdog()
    assert watchdog.patience == processes.FIRST_PATIENCE
    watchdog.heard()
    watchdog.patience = 0.05
    with watchdog.watching(lost.put):
        error = lost.get(timeout=60)
    assert re.fullmatch(
        r"Another machine has not answered for \d+ seconds, so the run ends here\.", str(error)
    )


def test_patience_grows_with_the_longest_wait() -> None:
    watchdog = processes.Watchdog()
    watchdog.last -= 100
    watchdog.heard()
    assert 1000 <= watchdog.patience < 1001 + 10 * 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("SIGSTOP@1", "Another machine has not answered for"),
        ("SIGINT@1", "Stopped after step 4."),
    ],
)
def test_a_machine_that_stops_or_is_interrupted_ends_the_others(
    place: Path, how: str, sentence: str
) -> None:
    command = launched(arguments(place, how, "rows.jsonl"), how, "4")
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        family = psutil.Process(process.pid)

        def end() -> None:
            for each in [*family.children(recursive=True), family]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()

        deadline = Timer(300, end)
        deadline.start()
        assert process.stdout is not None
        told = any(sentence in line for line in process.stdout)
        end()  # a process that is stopped stays, and mlx.launch with it
        deadline.cancel()
    assert told
