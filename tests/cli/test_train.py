"""`phimlx train`: flags, files, what is printed, and how errors end."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

from phimlx import api
from phimlx.cli.group import cli
from phimlx.cli.train import stop_requests
from phimlx.training.methods import METHODS
from tests.cli.terminal import CTRL_C, Terminal
from tests.test_imports import HOME
from tests.training.folder import write_rows, write_tiny

USAGE = "Usage: phimlx train [OPTIONS]\nTry 'phimlx train --help' for help.\n\nError: {}\n"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["train", *map(str, arguments)], prog_name="phimlx")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data is missing: name what to learn from."),
        (
            ["--batch-size", "0"],
            "Invalid value for '--batch-size': '0' is not a whole number, 1 or more.",
        ),
        (
            ["--optimizer", "sdg"],
            "Invalid value for '--optimizer': 'sdg' is not one of adamw, adam, adafactor, lion, "
            "muon, sgd.",
        ),
        (["--data", "x", "--mask-prompt", "--loss-on", "all"],
         "--mask-prompt and --loss-on all exclude each other."),
    ],
)  # fmt: skip
def test_wrong_usage(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (2, USAGE.format(message))


def test_check_trains_nothing(model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("--model", model, "--data", rows, "--adapter-path", out, "--check")
    assert result.exit_code == 0, result.output
    assert "rows.jsonl, line 1\n<|user|>" in result.stdout
    assert "<|assistant|>⟦0" in result.stdout
    assert "<|end|>⟧" in result.stdout
    assert "The run has 18 steps." in result.stdout
    assert not out.exists()


@pytest.mark.parametrize("flags", [["--check"], ["--check", "--json"], ["--iters", "1"]])
def test_what_rows_hold_and_is_not_used_is_told_once_a_file(
    model: Path, tmp_path: Path, flags: list[str]
) -> None:
    path = tmp_path / "d.jsonl"
    row = {"instruction": "Translate.", "input": "cat", "output": "chat"}
    path.write_text(4 * (json.dumps(row) + "\n"))
    arguments = ["--model", model, "--data", path, "--adapter-path", tmp_path / "out", *flags]
    mapped = run(*arguments, "--mapping", "prompt=instruction,completion=output")
    assert mapped.exit_code == 0, mapped.output
    told = "d.jsonl: not used: the column 'input' (4 rows). With --mapping input=input it follows"
    assert mapped.stderr.count(told) == mapped.stderr.count("not used") == 1
    if flags == ["--check"]:
        result = run(*arguments)
        assert "not used" not in result.stderr
        assert "<|user|>Translate.\n\ncat<|end|>" in result.stdout


def test_check_as_json(model: Path, rows: Path) -> None:
    result = run("--model", model, "--data", rows, "--check", "--json", "--iters", "5")
    found = json.loads(result.stdout)
    assert found["steps"] == 5
    assert found["data"]["train"]["rows"] == 23
    assert found["data"]["valid"]["rows"] == 1
    parts = {name: value for name, value in found["memory"].items() if name != "machine"}
    assert parts.pop("total") == sum(parts.values())
    assert result.stderr == ""


def test_a_run_that_made_the_model_worse_says_so(model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ["--model", model, "--data", rows, "--adapter-path", out, "--rank", "2"]
    result = run(*common, "--iters", "2", "--learning-rate", "10", "--steps-per-eval", "2")
    assert result.exit_code == 0, result.output
    (line,) = (out / "log.jsonl").read_text().splitlines()[:1]
    assert (
        f"Warning: The validation loss was {json.loads(line)['loss']:.4f} before the first step: "
        "what was learned makes it worse. Try a lower --learning-rate, or more steps.\n"
    ) in result.stderr


@pytest.mark.slow
def test_a_run_from_a_file_of_settings(model: Path, rows: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "run.yaml"
    file.write_text(
        f"model: {model}\ndata: {rows}\nadapter_path: {out}\niters: 9\nrank: 4\n"
        "valid_fraction: 0.25\nlearning_rate: 1e-2\nsteps_per_report: 2\nsample_prompts: 1\n"
    )
    result = run("--config", file, "--iters", "4", "--steps-per-eval", "2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["ending"], found["step"], found["adapter_path"]) == ("complete", 4, str(out))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        *(("validation", 0), ("sample", 0)),
        *(("train", 2), ("validation", 2), ("sample", 2)),
        *(("train", 4), ("validation", 4), ("sample", 4)),
    ]
    assert lines[0]["loss"] > lines[-2]["loss"] == found["best_loss"]
    assert result.stderr.startswith(f"step 0  validation loss {lines[0]['loss']:.4f}\n")
    assert {"README.md", "run.json", "adapter_config.json"} <= {f.name for f in out.iterdir()}
    card = (out / "README.md").read_text()
    assert f"4 steps of 4 rows, validation loss {found['best_loss']:.4f} at step 4." in card
    phi = api.load(model, adapter=out)
    plain = api.load(model)
    tokens = mx.array([phi.encode("Say 5.")])
    assert mx.abs(phi.model(tokens) - plain.model(tokens)).max() > 1e-3


def test_a_folder_that_is_taken_is_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    result = run("--model", model, "--data", rows, "--adapter-path", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {tmp_path} holds an adapter already.\n"
        "Hint: Go on with a run by --resume, or choose another --adapter-path.\n"
    )


def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phimlx.machine.memory.machine_memory", lambda: 2_000_000)
    monkeypatch.setattr(api, "load", lambda *_: pytest.fail("loaded"))
    result = run("--model", model, "--data", rows, "--adapter-path", tmp_path / "out")
    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert first.startswith("Error: The run is expected to need ")
    assert first.endswith(" of memory; this machine has 2.00 MB for it.")
    assert second == (
        "Hint: Take a model at 4 bits (phimlx convert -q), or a smaller one, or share it among "
        "several machines (--shard). To try all the same: --ignore-memory."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-seq-length", "2000"],
         "max_seq_length is 2,000, but the model holds 1,024 tokens."),
        (["--beta", "0.2"], "--beta does not go with --method sft."),
        (["--dpo", "--lambda", "0.2"], "--lambda does not go with --method dpo."),
        (["--method", "simpo", "--beta", "0"],
         "--beta is 0, which leaves --method simpo nothing to do."),
        (["--report-to", "wandb"], "Reporting to wandb needs a package that is not installed."),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(
    model: Path, rows: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = run("--model", model, "--data", rows, *options)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == f"Error: {message}"


def test_preferences_are_learned_by_the_same_command(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": f"{i} or so"} for i in range(12)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    out = tmp_path / "out"
    options = ["--dpo", "--iters", "2", "--steps-per-report", "1", "--learning-rate", "1e-2"]
    result = run("--model", model, "--data", rows, "--adapter-path", out, *options)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if line["kind"] == "train"]
    assert first["loss"] == pytest.approx(0.6931472, rel=1e-4)  # log 2: nothing is learned yet
    assert last["loss"] < first["loss"]
    assert set(first["metrics"]) == {"accuracy", "margin"}


@pytest.mark.parametrize("method", ["orpo", "simpo", "cpo", "kto"])
def test_judged_answers_are_learned_by_other_methods(
    model: Path, tmp_path: Path, method: str
) -> None:
    rows = tmp_path / "judged.jsonl"
    judged: list[dict[str, Any]] = [
        {"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": f"{i} or so"} for i in range(6)
    ]
    if method == "kto":
        judged = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in judged
            for name in ("chosen", "rejected")
        ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in judged))
    out = tmp_path / "out"
    options = ["--method", method, "--iters", "2", "--steps-per-report", "1"]
    options += ["--learning-rate", "1e-2", "--valid-fraction", "0", "--batch-size", "16"]
    result = run("--model", model, "--data", rows, "--adapter-path", out, *options)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    first, last = [line for line in lines if line["kind"] == "train"]
    assert last["loss"] < first["loss"]
    assert set(first["metrics"]) == set(METHODS[method].metrics)


CONTROLLED = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "from phimlx.cli.main import main; sys.argv[0] = 'phimlx'; main()"
)
"""A program whose terminal is its own, so that Ctrl-C reaches it."""


@pytest.mark.slow
def test_ctrl_c_leaves_the_line_before_the_notice(model: Path, rows: Path, tmp_path: Path) -> None:
    options = ["--model", str(model), "--data", str(rows), "--iters", "100000"]
    arguments = [sys.executable, "-c", CONTROLLED, "train", *options, "--adapter-path", "out"]
    with Terminal(arguments, tmp_path, PYTHONPATH=str(HOME)) as terminal:
        terminal.expect("validation loss")
        terminal.type(CTRL_C)
        terminal.expect("Stopping after this step; once more stops at once.")
        terminal.expect(": interrupted after ")
        assert terminal.wait() == 130
        lines = re.split(r"\r?\n", re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", terminal.raw))
    shown = [line.rpartition("\r")[2] for line in lines]
    told = shown.index("Stopping after this step; once more stops at once.")
    assert shown[told - 1] == ""
    assert any(line.startswith("out: interrupted after ") for line in shown)
    last = [line for line in shown if line][-1]
    assert last.startswith("Stopped after step ")
    assert last.endswith(". Go on with: phimlx train --resume --adapter-path out")


def test_a_signal_is_noted_by_its_handler_and_told_by_another_thread() -> None:
    told: list[tuple[str, bool]] = []

    def log(text: str) -> None:
        told.append((text, threading.current_thread() is threading.main_thread()))

    before = signal.getsignal(signal.SIGTERM)
    with stop_requests(log) as requested:
        assert not requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested()
        assert signal.getsignal(signal.SIGTERM) is before  # a second one ends the process
    assert told == [("Stopping after this step; once more stops at once.", False)]
    with stop_requests(log) as requested:
        pass
    assert len(told) == 1


@pytest.mark.slow
def test_all_weights_can_be_trained(model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--fine-tune-type", "full", "--iters", "2", "--learning-rate", "1e-3", "--pack"]
    result = run("--model", model, "--data", rows, "--adapter-path", out, *options)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "adapter_config.json").read_text())["fine_tune_type"] == "full"
    api.load(model, adapter=out)
