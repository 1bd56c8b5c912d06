"""Rows of judged answers: a label beside an answer, and pairs that become two answers."""

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
SAID = [{"role": "assistant", "content": "Ho"}]
GOOD = {"prompt": "Hi", "completion": "Ho", "label": True}


def dataset(*rows: dict[str, Any], form: Any = "answers", **options: Any) -> Dataset:
    places = (Row(f"d.jsonl, line {i}", row) for i, row in enumerate(rows, 1))
    return tokenize(places, ENCODER, RowSettings(form=form, **options))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "completion": SAID, "label": 1},
        {"messages": [*ASKED, *SAID], "label": "True"},
        {"instruction": "Hi", "input": "", "output": "Ho", "label": " 1 "},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
         "label": "true"},
    ],
)  # fmt: skip
def test_forms_that_say_the_same(row: dict[str, Any]) -> None:
    data = dataset(row)
    assert not data.faults.problems
    assert data.fingerprint == dataset(GOOD).fingerprint
    assert data.kinds == ["judged answers"]
    assert unused_notes([data]) == []


def test_a_label_decides_and_may_be_mapped() -> None:
    bad = {"question": "Hi", "answer": "Ho", "good": False}
    mapping = {"prompt": "question", "completion": "answer", "label": "good"}
    data = dataset(bad, mapping=mapping)
    assert [each.desirable for each in data.examples] == [False]
    assert data.fingerprint != dataset(GOOD).fingerprint


def test_a_pair_is_two_answers() -> None:
    data = dataset({"prompt": "Hi", "chosen": "Ho", "rejected": "No"})
    assert [each.desirable for each in data.examples] == [True, False]
    assert data.examples[0].tokens.tolist() == dataset(GOOD).examples[0].tokens.tolist()


def test_of_a_conversation_the_last_reply_is_judged() -> None:
    said = [*ASKED, *SAID, *ASKED, *SAID]
    (example,) = dataset({"messages": said, "label": 0}).examples
    last = dataset(GOOD).examples[0]
    assert example.supervised.sum() == last.supervised.sum()
    assert example.supervised[-int(last.supervised.sum()) :].all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "label": value}, f"'label' is {shown}; it must be true or false.")
        for value, shown in [(2, "2"), ("yes", "'yes'"), (None, "None"), ([], "[]"), (0.5, "0.5"),
                             ({}, "{}"), (float("nan"), "nan")]
    ] + [
        ({"prompt": "Hi", "completion": "Ho"},
         "It has 'prompt', 'completion', from which nothing can be learned."),
        ({"messages": [*ASKED, *SAID, *ASKED], "label": True},
         "Its last message is no reply, which the label could be about."),
        ({"text": "Hi", "label": True},
         "It has 'text', 'label', from which nothing can be learned."),
    ],
)  # fmt: skip
def test_faults_are_told(row: dict[str, Any], message: str) -> None:
    (problem,) = dataset(row).faults.problems
    assert str(problem) == f"d.jsonl, line 1: {message}"


def test_judged_answers_are_never_split() -> None:
    with pytest.raises(Exception, match="Splitting would leave a judged answer without"):
        RowSettings(form="answers", overlong="split")
