"""Rewards by name and of a user's own file, and whose files are run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phimlx.errors import TrainingError
from phimlx.training.data.batches import Task
from phimlx.training.rewards import Answered, fingerprints, read_rewards

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def judged(spec: str, *texts: str, expected: str = "7", tokens: int = 5) -> list[float]:
    task = Task("What?", expected, {"prompt": "What?", "completion": expected, "hint": "odd"})
    (reward,) = read_rewards([spec])
    return reward([Answered(task, text, tokens) for text in texts])


def test_exact_is_the_answer_of_the_row() -> None:
    found = judged("exact", "7", " 7\n", "70", "", "<think>\n6 + 1\n</think>\n\n7", "7.")
    assert found == [1, 1, 0, 0, 1, 0]


def test_a_pattern_is_looked_for() -> None:
    assert judged(r"regex:^\d+:?$", "12", "12:", "a 12", "") == [1, 1, 0, 0]


def test_json_is_valid_under_a_schema(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    texts = ('{"a": 1}', '{"b": 0,"a":2}', '{"a": "1"}', "[1]", "{", "[" * 100_000, "NaN")
    assert judged(f"schema:{file}", *texts) == [1, 1, 0, 0, 0, 0, 0]


def test_nothing_is_fetched_that_a_schema_refers_to(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"$ref": "http://127.0.0.1:9/schema.json"}))
    with pytest.raises(TrainingError, match="cannot be applied"):
        judged(f"schema:{file}", "1")


@pytest.mark.parametrize(("tokens", "worth"), [(1, 1), (10, 1), (15, 0.5), (20, 0), (90, 0)])
def test_length_has_a_bound(tokens: int, worth: float) -> None:
    assert judged("length:10", "x", tokens=tokens) == [worth]


def test_a_function_takes_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def some(completions, hint):\n    return [len(c) + (h == 'odd') for c, h in "
        "zip(completions, hint)]\n"
        "def every(**columns):\n    return [len(columns)] * len(columns['prompts'])\n"
    )
    assert judged(f"{file}:some", "abc", "") == [4, 1]
    assert judged(f"{file}:every", "abc") == [5]
    before = fingerprints([f"{file}:some", "exact"])
    file.write_text(file.read_text() + "\n")
    assert fingerprints([f"{file}:some", "exact"]) != before


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(", "mine.py failed"),
        ("raise ValueError('no')", "mine.py failed at line 1: ValueError: 'no'."),
        ("x = 1", "mine.py has no function f."),
        ("def f(other): return [1]", "mine.py:f failed"),
        ("def f(completions): return [1, 2, 3]", "mine.py:f gave 3 numbers for 1 answers."),
        ("def f(completions): return [float('nan')]", "mine.py:f gave a number that is not finite"),
        ("def f(completions): return None", "mine.py:f failed"),
        ("def f(completions):\n    return [1 / 0]", "mine.py:f failed at line 2: ZeroDivision"),
    ],
)
def test_a_file_that_does_not_do_is_one_sentence(tmp_path: Path, code: str, message: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(code)
    with pytest.raises(TrainingError) as error:
        judged(f"{file}:f", "x")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_no_code_of_a_model_or_a_data_set_is_run(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    mark = tmp_path / "run"
    (folder / "mine.py").write_text(f"open({str(mark)!r}, 'w')\ndef f(**c): return [1]\n")
    (tmp_path / "link.py").symlink_to(folder / "mine.py")
    for place in (folder / "mine.py", tmp_path / "link.py", folder / ".." / "model" / "mine.py"):
        with pytest.raises(TrainingError, match="whose files are never run"):
            read_rewards([f"{place}:f"], [folder])
    assert not mark.exists()


@pytest.mark.parametrize(
    "spec", ["", "exactly", "regex:", "regex:(", "length:", "length:-1", "length:x", "schema:/no",
             "a.txt:f", "a.py", "a.py:", "a.py:1f", "/nowhere/a.py:f", "length:" + "9" * 30]
)  # fmt: skip
def test_names_that_mean_nothing(spec: str) -> None:
    with pytest.raises(TrainingError):
        read_rewards([spec])
