"""What a check says of a data set: its numbers and what is learned, as data."""

from __future__ import annotations

import numpy as np
import pytest

from phimlx.hub.resolve import NANO
from phimlx.training.data.batches import Batches, Example
from phimlx.training.data.examples import Dataset, RowSettings, tokenize
from phimlx.training.data.loss_mask import RowEncoder
from phimlx.training.data.rows import Row
from phimlx.training.data.statistics import (
    abridged,
    rendered,
    rendered_samples,
    samples,
    summarize,
    summary_table,
)

ENCODER = RowEncoder.load(NANO)


def lengths(*tokens: int) -> Dataset:
    """Examples of so many tokens, of which a third is learned."""
    examples = [
        Example(np.arange(n, dtype=np.int32), np.arange(n) % 3 == 2, f"row {i}")
        for i, n in enumerate(tokens)
    ]
    return Dataset(examples, list(range(len(tokens))), ["texts"] * len(tokens))


def test_numbers_of_a_data_set() -> None:
    data = lengths(*range(3, 103))
    data.skipped["no reply to learn"] = 2
    summary = summarize(data, batch_size=4)
    assert summary.lengths == {5: 8, 50: 53, 95: 98, 100: 102}
    assert (summary.rows, summary.examples, summary.batches) == (100, 100, 25)
    assert summary.tokens == sum(range(3, 103))
    assert summary.supervised_share == sum(n // 3 for n in range(3, 103)) / summary.tokens
    assert summary.padding_share == 1 - Batches(data.examples, 4).real_share
    assert summary.fingerprint == data.fingerprint
    packed = summarize(data, batch_size=4, row_length=128)
    assert packed.padding_share == 1 - Batches(data.examples, 4, row_length=128).real_share
    assert packed.batches < summary.batches


def test_the_table_for_people() -> None:
    rows = [
        Row("1", {"prompt": "Hi", "completion": "Ho"}),
        Row("2", {"text": "one two three four five six seven eight"}),
        Row("3", {"messages": [{"role": "user", "content": "Hi"}]}),
    ]
    train = tokenize(rows, ENCODER, RowSettings(max_length=8, overlong="split"))
    summary = summarize(train, batch_size=1)
    assert summary.kinds == {"conversations": 1, "texts": 1}
    valid = summarize(lengths(9, 9), batch_size=2)
    assert summary_table({"train": summary, "valid": valid}) == [
        ["", "train", "valid"],
        ["rows", "2", "2"],
        ["examples", f"{len(train.examples)}", "2"],
        ["skipped: no reply to learn", "1", "0"],
        ["split", "1", "0"],
        ["length, 5 %", f"{summary.lengths[5]}", "9"],
        ["length, 50 %", "8", "9"],
        ["length, 95 %", "8", "9"],
        ["longest", "8", "9"],
        ["tokens an epoch", f"{summary.tokens}", "18"],
        ["batches an epoch", f"{len(train.examples)}", "1"],
        ["learned", f"{summary.supervised_share:.1%}", "33.3%"],
        ["padding", f"{summary.padding_share:.1%}", "0.0%"],
    ]


def test_what_is_learned_is_marked() -> None:
    row = Row(
        "d.jsonl, line 1",
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Grüß dich 🌍"},
                {"role": "user", "content": "And <|end|>?"},
                {"role": "assistant", "content": "Yes."},
            ]
        },
    )
    assert rendered_samples(tokenize([row], ENCODER), ENCODER.tokenizer) == [
        (
            "d.jsonl, line 1",
            [
                ("<|user|>Hi<|end|><|assistant|>", False),
                ("Grüß dich 🌍<|end|>", True),
                ("<|user|>And <|end|>?<|end|><|assistant|>", False),
                ("Yes.<|end|>", True),
            ],
        )
    ]


@pytest.mark.parametrize("mask", [[0, 0, 0], [0, 1, 1], [0, 1, 0], [0, 0, 1]])
def test_spans_are_the_whole_text(mask: list[int]) -> None:
    tokens = np.array(ENCODER.tokenizer.encode("abc"), np.int32)
    tokens = np.resize(tokens, 3)
    spans = rendered(Example(tokens, np.array(mask, bool)), ENCODER.tokenizer)
    assert "".join(text for text, _ in spans) == ENCODER.tokenizer.decode(tokens.tolist())
    assert [learned for _, learned in spans] == [
        bool(m) for i, m in enumerate(mask) if i == 0 or m != mask[i - 1]
    ]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, ["row 0"]), (2, ["row 0", "row 1"]), (9, ["row 0", "row 4", "row 8"])],
)
def test_samples_come_from_all_over(count: int, expected: list[str]) -> None:
    assert [e.source for e in samples(lengths(*[5] * count))] == expected


def test_long_spans_are_shown_by_their_ends() -> None:
    spans = [("short", False), ("a" * 30 + "b" * 30, True)]
    assert abridged(spans, 20) == [
        ("short", False),
        ("a" * 10 + " […40 characters…] " + "b" * 10, True),
    ]
