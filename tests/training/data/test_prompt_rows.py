"""Rows that are prompts: what is asked, and what an answer is compared with."""

from __future__ import annotations

from typing import Any

import pytest

from phimlx.hub.resolve import NANO
from phimlx.training.data.examples import Dataset, RowSettings, tokenize
from phimlx.training.data.loss_mask import RowEncoder
from phimlx.training.data.rows import Row
from phimlx.training.data.statistics import unused_notes

ENCODER = RowEncoder.load(NANO)
ASKED = [{"role": "user", "content": "Hi"}]


def dataset(*rows: dict[str, Any], **options: Any) -> Dataset:
    places = (Row(f"d.jsonl, line {i}", row) for i, row in enumerate(rows, 1))
    return tokenize(places, ENCODER, RowSettings(form="prompts", **options))


@pytest.mark.parametrize(
    ("row", "prompt", "expected"),
    [
        ({"prompt": "Hi"}, "Hi", None),
        ({"prompt": "Hi", "completion": "Ho", "level": 3}, "Hi", "Ho"),
        ({"prompt": "Hi", "completion": 7}, "Hi", "7"),
        ({"prompt": ASKED, "completion": [{"role": "assistant", "content": "Ho"}]}, ASKED, "Ho"),
        ({"messages": ASKED}, ASKED, None),
        ({"messages": [*ASKED, {"role": "assistant", "content": "Ho"}]}, ASKED, "Ho"),
        ({"instruction": "Hi", "output": "Ho"}, "Hi", "Ho"),
    ],
)
def test_forms(row: dict[str, Any], prompt: Any, expected: str | None) -> None:
    data = dataset(row)
    assert not data.faults.problems
    (example,) = data.examples
    assert example.task is not None
    assert (example.task.prompt, example.task.expected) == (prompt, expected)
    assert example.task.values == row
    assert example.tokens.tolist() == ENCODER.template.encode(ASKED)
    assert unused_notes([data]) == []


def test_what_rewards_see_is_part_of_the_data() -> None:
    one, other = dataset({"prompt": "Hi", "x": 1}), dataset({"prompt": "Hi", "x": 2})
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Hi"}, "It has 'question', from which nothing can be learned."),
        ({"prompt": ""}, "'prompt' is empty."),
        ({"prompt": "Hi", "completion": {}}, "'completion' is {}, not text."),
        ({"messages": [{"role": "assistant", "content": "Ho"}]},
         "It asks nothing that could be answered."),
    ],
)  # fmt: skip
def test_faults(row: dict[str, Any], message: str) -> None:
    (problem,) = dataset(row).faults.problems
    assert str(problem) == f"d.jsonl, line 1: {message}"


def test_a_long_prompt_is_refused() -> None:
    (problem,) = dataset({"prompt": "so " * 50}, max_length=20).faults.problems
    assert "tokens, but 20 are allowed." in str(problem)
