"""`phimlx train --method grpo`: rewards and who names them, reports, and a run taken up again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

from phimlx.cli.group import cli
from tests.training.folder import write_tiny

REWARD = (
    "def score(completions, completion, **columns):\n"
    "    return [c.count(w) - 0.01 * len(c) for c, w in zip(completions, completion)]\n"
)
TIMES = ("seconds", "left", "tokens_per_second", "peak_memory")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    write_tiny(folder / "model")
    rows = [{"prompt": f"Say {i}.", "completion": f"{i}"} for i in range(5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(REWARD)
    return folder


def run(place: Path, *more: str | Path, data: str = "rows.jsonl") -> Result:
    words = ["train", "--model", place / "model", "--data", place / data, "--method", "grpo"]
    return CliRunner().invoke(cli, [*map(str, words), *map(str, more)], prog_name="phimlx")


SHORT = ("--iters", "3", "--batch-size", "2", "--group-size", "3", "--max-tokens", "5",
         "--steps-per-report", "1", "--learning-rate", "1e-2", "--rank", "2", "--dropout", "0.1",
         "--save-every", "2", "--valid-fraction", "0.3", "--steps-per-eval", "3")  # fmt: skip


def log(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def test_a_run_reports_and_resumes_exactly(place: Path) -> None:
    reward = f"{place / 'mine.py'}:score"
    for name in ("whole", "cut"):
        done = run(place, *SHORT, "--reward", reward, "--adapter-path", place / name)
        assert done.exit_code == 0, done.output
    whole, cut = place / "whole", place / "cut"
    assert log(cut) == log(whole)
    trained = [row for row in log(whole) if row["kind"] == "train"]
    assert [set(row["metrics"]) for row in trained] == [
        {"reward", "reward_std", "length", "kl", "clipped"}
    ] * 3
    assert trained[0]["metrics"]["kl"] == pytest.approx(0, abs=1e-6)  # nothing is learned yet
    assert trained[-1]["metrics"]["kl"] > 0
    assert [set(row["metrics"]) for row in log(whole) if row["kind"] == "validation"] == [
        {"reward", "length"}
    ] * 2
    # As if it had been killed after its second step.
    shutil.rmtree(cut / "checkpoints" / "step-0000003")
    about = json.loads((cut / "run.json").read_text())
    del about["ended"]
    (cut / "run.json").write_text(json.dumps(about))
    resume = ["train", "--resume", "--adapter-path", str(cut)]
    refused = CliRunner().invoke(cli, resume)
    assert refused.exit_code == 1  # a folder of a run may come from anybody
    assert f"The reward {reward} is Python to be run" in refused.stderr
    assert f"add: --reward {reward}" in refused.stderr
    original = (place / "mine.py").read_text()
    (place / "mine.py").write_text(original + "# changed\n")
    changed = CliRunner().invoke(cli, [*resume, "--reward", reward])
    assert "A file that rewards answers has changed." in changed.stderr
    (place / "mine.py").write_text(original)
    again = CliRunner().invoke(cli, [*resume, "--reward", reward])
    assert again.exit_code == 0, again.output
    assert log(cut) == log(whole)
    one, other = (mx.load(str(folder / "adapters.safetensors")) for folder in (whole, cut))
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    assert all(mx.array_equal(other[name], array) for name, array in one.items())


def test_a_file_of_settings_runs_nothing(place: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = tmp_path / "code.py"
    code.write_text(f"open({str(mark)!r}, 'w')\n{REWARD}")
    config = tmp_path / "run.yaml"
    config.write_text(f"reward: ['{code}:score']\nmax_tokens: 4\n")
    result = run(place, "--config", config, "--adapter-path", tmp_path / "out")
    assert result.exit_code == 1
    assert "is Python to be run, which the command line has to name." in result.stderr
    assert not mark.exists()


def test_code_beside_a_model_or_in_a_folder_of_data_is_not_run(place: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copyfile(place / "rows.jsonl", folder / "train.jsonl")
    for home in (place / "model", folder):
        (home / "code.py").write_text(f"open({str(mark)!r}, 'w')\n{REWARD}")
        reward = ("--reward", f"{home / 'code.py'}:score")
        out = tmp_path / "out"
        words = ["train", "--model", place / "model", "--data", folder, "--method", "grpo"]
        command = [*map(str, words), *reward, "--max-tokens", "4", "--adapter-path", str(out)]
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 1
        assert "whose files are never run." in result.stderr
    assert not mark.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "Nothing says what an answer is worth."),
        (("--reward", "exact", "--pack"), "--pack does not go with --method grpo."),
        (("--reward", "exact", "--gamma", "1"), "--gamma does not go with --method grpo."),
        (("--reward", "exact", "--max-tokens", "1023"),
         "--max-tokens is 1,023, which leaves no room for a prompt in 1,024 tokens."),
        (("--reward", "exact", "--overlong", "cut"),
         "A prompt that is too long is always refused."),
        (("--reward", "best"), "There is no reward 'best'."),
        (("--method", "sft", "--reward", "exact"), "--reward does not go with --method sft."),
        (("--method", "dpo", "--group-size", "4"), "--group-size does not go with --method dpo."),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(
    place: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    result = run(place, *more, "--adapter-path", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == f"Error: {message}"


def test_an_answer_to_compare_with_is_needed(place: Path, tmp_path: Path) -> None:
    (place / "bare.jsonl").write_text('{"prompt": "Hi", "answer": "Ho"}\n' * 2)
    out = ("--adapter-path", tmp_path / "out", "--reward", "exact")
    result = run(place, *out, data="bare.jsonl")
    assert result.stderr.splitlines() == [
        "Error: bare.jsonl, line 1 has no answer, which --reward exact compares with.",
        "Hint: Name its column: --mapping completion=answer",
    ]
    checked = run(place, *out, "--mapping", "completion=answer", "--check", data="bare.jsonl")
    assert checked.exit_code == 0, checked.output
