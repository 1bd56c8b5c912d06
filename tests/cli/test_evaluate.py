"""`phimlx evaluate`: what is printed, what --json holds, and wrong usage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import phimlx
from phimlx.cli.group import cli
from phimlx.evaluation.data import examples_of, measure_loss, read_data
from phimlx.training.data.examples import RowSettings

ROWS = [
    {"prompt": "What is 3 + 4?", "completion": "7"},
    {"prompt": "What is 2 + 2?", "completion": "Four!"},
    {"prompt": "What is 5 - 1?", "completion": "4"},
    {"prompt": "What is 1 + 1?", "completion": "2"},
]


def run(*arguments: str | Path) -> Result:
    words = ["evaluate", "--model", "nano", *map(str, arguments)]
    return CliRunner().invoke(cli, words, prog_name="phimlx")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_loss_and_answers(rows: Path, tmp_path: Path) -> None:
    phi = phimlx.load("nano")
    examples = examples_of(phi, read_data(rows), RowSettings()).examples
    loss = measure_loss(phi.model, examples, 8)
    saved = tmp_path / "answers.jsonl"
    flags = ("--data", rows, "--answers", "--max-tokens", "8", "--save-answers", saved)
    result = run(*flags, "--json")
    assert result.exit_code == 0
    answers = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [answer["expected"] for answer in answers] == ["7", "Four!", "4", "2"]
    assert [answer["given"] for answer in answers] == ["7", "4", "4", "2"]
    assert [answer["exact"] for answer in answers] == [True, False, True, True]
    assert json.loads(result.stdout) == {
        "model": "nano",
        "adapter": None,
        "loss": pytest.approx(loss.loss, rel=1e-3),
        "tokens": loss.tokens,
        "examples": 4,
        "perplexity": pytest.approx(loss.perplexity, rel=1e-3),
        "questions": 4,
        "exact_match": 0.75,
        "f1": 0.75,
        "identical": 0.75,
        "cut": 0,
    }
    lines = run(*flags).stdout.splitlines()
    assert lines[0].split() == ["Measure", "Value"]
    table = dict(line.rsplit("  ", 1) for line in lines[2:])
    table = {name.strip(): value.strip() for name, value in table.items()}
    assert table.pop("Loss") == f"{loss.loss:.4f}"
    assert table.pop("Perplexity") == f"{loss.perplexity:.4g}"
    assert table == {
        "Measured on": f"{loss.tokens} tokens of 4 rows",
        "Exact match": "75.0%",
        "Token F1": "75.0%",
        "Same text": "75.0%",
        "Questions": "4",
    }


def test_answers_that_are_cut_are_told(rows: Path) -> None:
    result = run("--data", rows, "--answers", "--max-tokens", "1", "--limit", "1")
    assert result.stderr.endswith(
        "Warning: 1 of 1 answers were cut off after 1 tokens; --max-tokens raises that.\n"
    )


def test_columns_of_other_names_and_rows_that_ask_nothing(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("question,answer\nWhat is 3 + 4?,7\n")
    result = run("--data", file, "--answers", "--mapping", "prompt=question,completion=answer")
    assert result.exit_code == 0
    assert ["Exact", "match", "100.0%"] in [line.split() for line in result.stdout.splitlines()]
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "One, two."}\n{"prompt": "What is 3 + 4?", "completion": "7"}\n')
    result = run("--data", file, "--answers")
    assert result.stderr == "1 of 2 rows ask nothing that is answered in words.\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Error: There is nothing to measure: give --data or --tasks.\n"),
        (["--data", "x", "--save-answers", "y"], 2, "Error: --save-answers goes with --answers.\n"),
        (
            ["--tasks", "x", "--answers"],
            2,
            "Error: --answers, --split, --mapping, --prompt and --media-root go with --data.\n",
        ),
        (
            ["--data", "x", "--kv-bits", "8"],
            2,
            "Error: --kv-bits goes with --answers or --tasks.\n",
        ),
        (["--data", "x", "--num-shots", "1"], 2, "Error: --num-shots goes with --tasks.\n"),
        (
            ["--data", "x", "--mapping", "prompt"],
            2,
            "Error: --mapping takes pairs such as prompt=question,completion=answer.\n",
        ),
        (["--data", "none.jsonl"], 1, None),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    code: int,
    message: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    if message is None:
        assert result.stderr.startswith("Error: There is no data none.jsonl.\n")
    else:
        assert result.stderr.endswith(message)


@pytest.fixture
def adapter(rows: Path, tmp_path: Path) -> Path:
    """One that has been taught other answers."""
    out = tmp_path / "taught"
    words = ["train", "--model", "nano", "--data", rows, "--adapter-path", out, "--iters", "3"]
    words += ["--learning-rate", "1e-2", "--rank", "2", "--valid-fraction", "0.5"]
    assert CliRunner().invoke(cli, list(map(str, words))).exit_code == 0
    return out


def test_an_adapter_is_measured_as_training_measured_it(rows: Path, adapter: Path) -> None:
    """Loss and answers are those with it, the loss of the model alone another."""
    with_it = json.loads(run("--data", rows, "--adapter-path", adapter, "--json").stdout)
    alone = json.loads(run("--data", rows, "--json").stdout)
    assert abs(with_it["loss"] - alone["loss"]) > 0.1
    fused = adapter.parent / "fused"
    words = ["fuse", "--model", "nano", "--adapter-path", adapter, "--save-path", fused]
    assert CliRunner().invoke(cli, list(map(str, words))).exit_code == 0
    phi = phimlx.load(fused)
    examples = examples_of(phi, read_data(rows), RowSettings()).examples
    assert with_it["loss"] == pytest.approx(measure_loss(phi.model, examples).loss, rel=2e-2)


def test_two_are_compared_on_the_same_rows(rows: Path, adapter: Path) -> None:
    flags = ("--data", rows, "--answers", "--max-tokens", "8", "--compare", "nano", adapter)
    result = run(*flags, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["a"]["adapter"], found["b"]["adapter"], found["rows"]) == (False, True, 4)
    for flag, side in (((), "a"), (("--adapter-path", adapter), "b")):
        alone = json.loads(
            run("--data", rows, "--answers", "--max-tokens", "8", *flag, "--json").stdout
        )
        assert found["measures"]["loss per token"][side] == pytest.approx(alone["loss"], rel=1e-3)
        assert found["measures"]["exact match"][side] == alone["exact_match"]
    assert [each["place"] for each in found["results"]] == [
        f"rows.jsonl, line {line}" for line in (1, 2, 3, 4)
    ]
    differ = [
        each["place"]
        for each in found["results"]
        if each["a"]["answer"]["exact"] != each["b"]["answer"]["exact"]
    ]
    text = run(*flags).stdout
    assert f"One of the two is right in {len(differ)} of 4 rows." in text
    assert all(place in text for place in differ)


def test_a_model_and_itself_do_not_differ(rows: Path) -> None:
    result = run("--data", rows, "--compare", "nano", "nano", "--json")
    (measure,) = json.loads(result.stdout)["measures"].values()
    assert (measure["difference"], measure["interval"], measure["clear"]) == (0, [0, 0], False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--compare", "nano", "nano", "--tasks", "x"), "--tasks does not go with --compare."),
        (
            ("--compare", "nano", "nano", "--data", "x", "--adapter-path", "y"),
            "--adapter-path does not go with --compare.",
        ),
    ],
)
def test_what_does_not_go_with_comparing(flags: tuple[str, ...], message: str) -> None:
    result = run(*flags)
    assert result.exit_code == 2
    assert message in result.stderr
