"""Loss, perplexity and answers: against plain formulas, and SQuAD's own examples of comparing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import phimlx
from phimlx.api import Phi
from phimlx.errors import PhimlxError, TrainingError
from phimlx.evaluation.data import (
    ask,
    examples_of,
    measure_loss,
    normalized,
    questions_of,
    read_data,
    token_f1,
)
from phimlx.training.data.batches import Example
from phimlx.training.data.examples import RowSettings
from phimlx.training.settings import TrainSettings
from phimlx.training.trainable import attach
from tests.training.models import tiny

ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 3 + 4?", "completion": "7"},
    {
        "messages": [
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "Add 1 to it."},
            {"role": "assistant", "content": "It is certainly nine."},
        ]
    },
    {"text": "The quick brown fox."},
]


@pytest.fixture(scope="module")
def nano() -> Phi:
    return phimlx.load("nano", dtype="float32")


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("adapted", [False, True])
def test_the_loss_is_that_of_each_example_by_itself(adapted: bool) -> None:
    model = tiny()
    if adapted:
        attach(model, TrainSettings(rank=2, dropout=0.5))  # which drops nothing here
    drawn = np.random.default_rng(2).integers(3, 300, (9, 45)).astype(np.int32)
    examples = [
        Example(tokens[: 5 + 5 * i], np.arange(5 + 5 * i) > i, f"row {i}")
        for i, tokens in enumerate(drawn)
    ]
    losses = []
    for example in examples:
        logits = model(mx.array(example.tokens[None, :-1]))[0]
        each = nn.losses.cross_entropy(logits, mx.array(example.tokens[1:]))
        losses += np.array(each)[example.supervised[1:]].tolist()
    counted: list[int] = []
    for batch_size in (1, 4):
        loss = measure_loss(model, examples, batch_size, counted.append)
        assert loss.loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert (loss.tokens, loss.examples) == (len(losses), 9)
        assert loss.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert sum(counted) == 18


def test_rows_become_what_training_would_make_of_them(nano: Phi, tmp_path: Path) -> None:
    rows = read_data(write(tmp_path, ROWS))
    examples = examples_of(nano, rows, RowSettings()).examples
    assert nano.tokenizer is not None
    learned = [nano.tokenizer.decode(e.tokens[e.supervised].tolist()) for e in examples]
    assert learned[:2] == ["7<|end|>", "4<|end|>It is certainly nine.<|end|>"]
    assert len(examples) == 3


def test_questions_and_answers(nano: Phi, tmp_path: Path) -> None:
    questions, without = questions_of(nano, read_data(write(tmp_path, ROWS)), RowSettings())
    assert without == 1
    assert [q.expected for q in questions] == ["7", "It is certainly nine."]
    assert questions[0].tokens == nano.encode("What is 3 + 4?")
    assert questions[1].tokens == nano.encode(ROWS[1]["messages"][:-1])
    answers = ask(nano, questions, max_tokens=8)
    alone = [nano.generate(q.tokens, temperature=0, max_tokens=8) for q in questions]
    assert [a.given for a in answers.answers] == [reply.text.strip() for reply in alone]
    assert [a.place for a in answers.answers] == ["rows.jsonl, line 1", "rows.jsonl, line 2"]
    assert (answers.answers[0].exact, answers.answers[0].f1) == (True, 1.0)
    assert (answers.exact_match, answers.identical) == (0.5, 0.5)
    assert answers.f1 == pytest.approx((1 + answers.answers[1].f1) / 2)
    assert answers.cut == sum(reply.finish_reason == "length" for reply in alone)


# The forms that SQuAD's evaluation script brings together, and its F1 by hand.
@pytest.mark.parametrize(
    ("given", "expected", "f1"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1.0),
        ("an apple,  a pear", "Apple pear!", 1.0),
        ("in 1912", "1912", 2 / 3),
        ("cat cat dog", "cat", 1 / 2),
        ("theatre", "the atre", 0.0),
        ("", "the", 1.0),
        ("", "word", 0.0),
    ],
)
def test_answers_are_compared_as_squad_does(given: str, expected: str, f1: float) -> None:
    assert token_f1(given, expected) == pytest.approx(f1)
    assert (normalized(given) == normalized(expected)) == (f1 == 1)


def test_which_rows(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("valid", 2)):
        write(tmp_path, ROWS[:1] * count, f"{split}.jsonl")
    assert len(read_data(tmp_path)) == 2  # the last of train, valid, test that is there
    assert len(read_data(tmp_path, "train")) == 3
    assert len(read_data(tmp_path, "train", limit=2)) == 2
    with pytest.raises(TrainingError) as caught:
        read_data(tmp_path, "test")
    assert str(caught.value) == f"{tmp_path} has no split test; it has train, valid."


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "Hi", "completion": "Ho"}, {"question": "?"}],
            "rows.jsonl, line 2: It has 'question', from which nothing can be learned.",
        ),
        (
            [{"messages": [{"role": "user", "content": "Hi"}]}],
            "The data holds no token to predict.",
        ),
    ],
)
def test_data_that_cannot_be_measured(
    nano: Phi, rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PhimlxError) as caught:
        examples_of(nano, read_data(write(tmp_path, rows)), RowSettings())
    assert str(caught.value) == message


def test_data_without_questions(nano: Phi, tmp_path: Path) -> None:
    questions, without = questions_of(nano, read_data(write(tmp_path, ROWS[2:])), RowSettings())
    assert without == 1
    with pytest.raises(TrainingError) as caught:
        ask(nano, questions)
    assert str(caught.value) == "The data holds no question with its answer."
