"""`phimlx distill`: from probabilities and from answers, stopped and taken up, and its errors."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

from phimlx import api, prompt_file
from phimlx.api import Phi
from phimlx.cli.group import cli
from phimlx.training.distill import teacher
from phimlx.training.distill.logits_file import TeacherLogits
from tests.training.folder import write_tiny


def run(*arguments: str | Path, command: str = "distill") -> Result:
    return CliRunner().invoke(cli, [command, *map(str, arguments)], prog_name="phimlx")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    sums = [{"prompt": f"What is {n} + 4?", "completion": str(n + 4)} for n in range(3, 12)]
    sums.append({"prompt": "What is 5 + 5?", "completion": "eleven"})
    path.write_text("".join(json.dumps(row) + "\n" for row in sums))
    return path


@pytest.mark.slow
def test_probabilities_are_learned_and_taken_again(
    student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--teacher", "nano", "--student", student, "--data", rows, "--rank", "2",
              "--teacher-data", tmp_path / "kept", "--iters", "2", "--json"]  # fmt: skip
    loaded: list[weakref.ref[Phi]] = []
    load = api.load

    def loading(*arguments: Any, **options: Any) -> Phi:
        assert all(each() is None for each in loaded), "teacher and student are there together"
        phi = load(*arguments, **options)
        loaded.append(weakref.ref(phi))
        return phi

    monkeypatch.setattr(api, "load", loading)
    first = run(*common, "--adapter-path", tmp_path / "a", "--loss", "jsd")
    assert first.exit_code == 0, first.output
    assert len(loaded) == 2
    assert json.loads(first.stdout)["ending"] == "complete"
    assert "probabilities of" in first.stderr
    assert "divergence" in first.stderr
    kept = TeacherLogits(tmp_path / "kept" / "probabilities.safetensors")
    assert (kept.k, kept.vocab_size) == (64, 1536)
    monkeypatch.setattr(teacher, "likeliest", None)  # nobody asks the teacher again
    second = run(*common, "--adapter-path", tmp_path / "b", "--sft-weight", "0.5")
    assert second.exit_code == 0, second.output
    assert "are taken from" in second.stderr
    other = run(*common, "--adapter-path", tmp_path / "c", "--top-k", "3")
    assert other.exit_code == 1
    assert "holds probabilities of another k: 64, not 3." in other.stderr
    resumed = run("--adapter-path", tmp_path / "a", "--resume", command="train")
    assert resumed.exit_code == 1
    assert "was begun by phimlx distill." in resumed.stderr
    again = run("--adapter-path", tmp_path / "a", "--resume")
    assert "is complete: it took 2 steps." in again.stderr


@pytest.mark.slow
def test_answers_are_checked_learned_and_kept(
    student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a"
    common = ["--teacher", "nano", "--student", student, "--data", rows, "--via", "text",
              "--exact", "--regex", "[0-9]+", "--iters", "1", "--rank", "2",
              "--adapter-path", out, "--answer-tokens", "8"]  # fmt: skip
    add, calls = prompt_file.Journal.add, []

    def stopped(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        add(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prompt_file.Journal, "add", stopped)
        result = run(*common)
    assert result.exit_code == 130, result.output
    assert "the same command goes on where it was" in result.stderr
    result = run(*common)
    assert result.exit_code == 0, result.output
    assert "3 of 10 answers had been answered before." in result.stderr
    kept = (out / "teacher" / "train.jsonl").read_text().splitlines()
    rejected = (out / "teacher" / "rejected.jsonl").read_text().splitlines()
    assert len(kept) + len(rejected) == 10
    assert len(kept) >= 8
    assert "another answer than the row's" in rejected[-1]
    used = run("--model", student, "--data", out / "teacher", "--check", command="train")
    assert used.exit_code == 0, used.output


def test_check_asks_nobody(student: Path, rows: Path, tmp_path: Path) -> None:
    common = ["--teacher", "nano", "--student", student, "--data", rows, "--check",
              "--adapter-path", tmp_path / "a", "--json"]  # fmt: skip
    found = json.loads(run(*common).stdout)
    assert found["via"] == "logits"
    assert found["disk"] > 0
    assert found["memory"]["teacher"] > 4_700_000
    asked = json.loads(run(*common, "--via", "text", "--samples", "3").stdout)
    assert (asked["via"], asked["answers"]) == ("text", 30)
    assert not (tmp_path / "a").exists()


def other_vocabulary(folder: Path) -> Path:
    write_tiny(folder)
    config = json.loads((folder / "config.json").read_text())
    weights: Any = mx.load(str(folder / "model.safetensors"))
    rows = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = mx.concatenate([rows, rows[:64]])
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 1600}))
    return folder


def test_other_vocabularies_are_told_plainly(rows: Path, tmp_path: Path) -> None:
    common = ["--teacher", "nano", "--student", other_vocabulary(tmp_path / "student"),
              "--data", rows, "--adapter-path", tmp_path / "a", "--check"]  # fmt: skip
    result = run(*common, "--via", "logits")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: The teacher's probabilities cannot be learned: its vocabulary has 1,536 tokens, "
        "and the student's 1,600, so that the two have no tokens in common.\n"
        "Hint: Learn from the teacher's answers instead: --via text\n"
    )
    result = run(*common)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("The student learns the teacher's answers, not its prob")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exact", "--via", "logits"], "exact checks the teacher's answers, and the data's own"),
        (["--schema", "a int"], "schema checks the teacher's answers, and the data's own are"),
        (
            ["--samples", "3", "--via", "text", "--answer-temperature", "0"],
            "3 answers of temperatu",
        ),
        (["--teacher", "STUDENT"], "Teacher and student are the same model"),
        (["--logits-limit", "1e-9"], "would take"),
        (["--via", "text", "--judge", "ROWS"], "The judge's prompt does not show the answer."),
        (["--via", "text", "--regex", "("], "A reply cannot be held to this"),
    ],
)
def test_what_does_not_go_together(
    student: Path, rows: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    named = {"STUDENT": str(student), "ROWS": str(rows)}
    result = run(
        "--teacher", "nano", "--student", student, "--data", rows,
        "--adapter-path", tmp_path / "a", *(named.get(each, each) for each in arguments),
    )  # fmt: skip
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert not (tmp_path / "a" / "run.json").exists()


def test_rows_that_only_ask_are_for_the_teacher_to_answer(student: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "What is 1 + 1?"}\n')
    result = run("--teacher", "nano", "--student", student, "--data", asked,
                 "--adapter-path", tmp_path / "a")  # fmt: skip
    assert result.exit_code == 1
    assert result.stderr.endswith(
        "Hint: Let the teacher answer rows that only ask: --via both, or --via text\n"
    )


@pytest.mark.parametrize(
    ("arguments", "missing"), [(["--data", "x"], "--teacher"), (["--teacher", "nano"], "--data")]
)
def test_what_is_missing_is_named(arguments: list[str], missing: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert f"{missing} is missing" in result.stderr
