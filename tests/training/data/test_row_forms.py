"""The forms in which rows come: Alpaca's, ShareGPT's, weights, reasoning, and what is not used."""

from __future__ import annotations

import contextlib
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phimlx.errors import PromptError
from phimlx.hub.resolve import NANO
from phimlx.training.data.examples import Dataset, RowSettings, tokenize
from phimlx.training.data.loss_mask import LossOn, RowEncoder
from phimlx.training.data.row_messages import RowError
from phimlx.training.data.row_types import read_content
from phimlx.training.data.rows import Row
from phimlx.training.data.statistics import rendered, summarize, unused_notes

ENCODER = RowEncoder.load(NANO)
THINKING = RowEncoder.load(NANO, "phi-4-mini-reasoning")
WORDS = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
EMPTY: list[Any] = [None, "", "  ", [], {}, float("nan")]


def dataset(*rows: dict[str, Any], encoder: RowEncoder = ENCODER, **options: Any) -> Dataset:
    places = (Row(f"d.jsonl, line {i}", row) for i, row in enumerate(rows, 1))
    data = tokenize(places, encoder, RowSettings(**options))
    assert not data.faults.problems
    return data


def texts(data: Dataset) -> list[str]:
    """Whole examples, what is learned between brackets."""
    return [
        "".join(f"⟦{text}⟧" if is_learned else text for text, is_learned in pieces)
        for pieces in (rendered(each, ENCODER.tokenizer) for each in data.examples)
    ]


def alike(one: dict[str, Any], other: dict[str, Any], **options: Any) -> None:
    """Assert that two rows are the same to learn from."""
    assert dataset(one, **options).fingerprint == dataset(other, **options).fingerprint


# Alpaca


@given(WORDS, st.one_of(st.none(), st.just(" "), WORDS), WORDS)
def test_alpaca_is_a_prompt_with_its_input_below(
    instruction: str, below: str | None, output: str
) -> None:
    prompt = f"{instruction}\n\n{below}" if below and below.strip() else instruction
    for row in (
        {"instruction": instruction, "input": below, "output": output},
        {"text": "whole", "output": output, "input": below, "instruction": instruction},
    ):
        found = read_content(row, {}).content
        assert found == read_content({"prompt": prompt, "completion": output}, {}).content


def test_alpaca_without_a_column_of_inputs_and_with_a_system() -> None:
    alike({"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"})
    alike(
        {"system": "s", "instruction": "a", "input": "i", "output": "b"},
        {"system": "s", "prompt": "a\n\ni", "completion": "b"},
    )
    alike(
        {"instruction": "a", "input": "i", "chosen": "b", "rejected": "c"},
        {"prompt": "a\n\ni", "chosen": "b", "rejected": "c"},
        form="pairs",
    )


@pytest.mark.parametrize(
    ("mapping", "row"),
    [
        ({"completion": "response"}, {"instruction": "a", "input": "i", "response": "b"}),
        ({"prompt": "q", "completion": "a", "input": "c"}, {"q": "a", "c": "i", "a": "b"}),
        ({"input": "c"}, {"instruction": "a", "c": "i", "output": "b"}),
        ({"input": "context"}, {"prompt": "a", "context": "i", "completion": "b"}),
        (
            {"prompt": "instruction", "completion": "output", "input": "input"},
            {"instruction": "a", "input": "i", "output": "b"},
        ),
    ],
)
def test_an_input_can_be_mapped(mapping: dict[str, str], row: dict[str, Any]) -> None:
    data = dataset(row, mapping=mapping)
    assert data.fingerprint == dataset({"prompt": "a\n\ni", "completion": "b"}).fingerprint
    assert unused_notes([data]) == []


# What is not used


def test_columns_that_are_not_used_are_told_with_their_count() -> None:
    rows = [{"instruction": "a", "input": "i", "output": "b"}] * 3
    data = dataset(*rows, mapping={"prompt": "instruction", "completion": "output"})
    assert unused_notes([data]) == [
        "d.jsonl: not used: the column 'input' (3 rows). "
        "With --mapping input=input it follows the prompt."
    ]
    assert summarize(data, 1).unused == {"d.jsonl": {"the column 'input'": 3}}


FORMS: list[dict[str, Any]] = [
    {"text": "a"},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "output": "b"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
]
PAIR: dict[str, Any] = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize("form", [*FORMS, PAIR])
@pytest.mark.parametrize("extra", ["Unnamed: 0", "__index_level_0__", "id", "source", "history"])
def test_other_columns_change_nothing_and_are_told(form: dict[str, Any], extra: str) -> None:
    options = {"form": "pairs" if form is PAIR else "examples"}
    rows = [form | {extra: value} for value in (0, 1, "x", [1], *EMPTY)]
    data = dataset(*rows, **options)
    assert data.fingerprint == dataset(*[form] * len(rows), **options).fingerprint
    assert unused_notes([data]) == [f"d.jsonl: not used: the column {extra!r} (4 rows)."]


@pytest.mark.parametrize("form", [*FORMS, PAIR])
def test_columns_that_hold_nothing_are_not_told(form: dict[str, Any]) -> None:
    rows = [form | {"extra": value} for value in EMPTY]
    assert unused_notes([dataset(*rows, form="pairs" if form is PAIR else "examples")]) == []


def test_other_keys_of_messages_change_nothing_and_are_counted_once_a_row() -> None:
    user, reply = FORMS[3]["messages"]
    keys = {"id": 7, "mood": "glad", "refusal": None, "annotations": []}
    data = dataset({"messages": [user | keys, reply | keys]}, {"messages": [user, reply | keys]})
    assert data.fingerprint == dataset(FORMS[3], FORMS[3]).fingerprint
    assert unused_notes([data]) == [
        "d.jsonl: not used: the key 'id' of messages (2 rows), the key 'mood' of messages (2 rows)."
    ]


def test_names_without_end_are_told_in_one_line() -> None:
    data = dataset(*({"text": "a", f"column {i} {'x' * 1000}": 1} for i in range(300)))
    (note,) = unused_notes([data])
    assert len(data.unused["d.jsonl"]) == 101
    assert note.endswith("93 more.")
    assert len(note) < 600


def test_held_out_rows_do_not_tell_it_twice() -> None:
    data = dataset(*({"text": "a" * i, "id": i} for i in range(1, 9)))
    assert unused_notes(data.hold_out(0.25)) == ["d.jsonl: not used: the column 'id' (8 rows)."]


# Weights


def talk(weights: list[Any], **more: Any) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    for i, weight in enumerate(weights):
        reply = {"role": "assistant", "content": f"reply {i}"}
        reply |= {} if weight is Ellipsis else {"weight": weight}
        messages += [{"role": "user", "content": f"ask {i}"} | more, reply]
    return {"messages": messages}


WEIGHTS = [0, 0.0, False, 1, 1.0, True, None, ...]
CASES = [list(each) for each in itertools.product(WEIGHTS[::2], WEIGHTS[1::2], [0, 1])]


@pytest.mark.parametrize("weights", CASES)
@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_a_weight_says_which_replies_are_learned(weights: list[Any], loss_on: LossOn) -> None:
    wanted = [weight is None or weight is Ellipsis or bool(weight) for weight in weights]
    learned = [each and (loss_on != "last" or i == 2) for i, each in enumerate(wanted)]
    data = dataset(talk(weights), loss_on=loss_on)
    if not any(learned) and loss_on != "all":
        assert data.skipped == {"no reply to learn": 1}
        return
    (example,) = data.examples
    pieces = rendered(example, ENCODER.tokenizer)
    for i, expected in enumerate(learned if loss_on != "all" else wanted):
        end = f"reply {i}<|end|>"
        assert any(end in text for text, is_learned in pieces if is_learned) == expected
    told = "".join(text for text, is_learned in pieces if is_learned)
    assert ("ask 0" in told) == (loss_on == "all")


def test_weights_stay_with_their_replies_where_a_conversation_is_split() -> None:
    whole = len(dataset(talk([1])).examples[0].tokens)
    weights = [0, 1, 0, 1, 1, 0]
    data = dataset(talk(weights), overlong="split", max_length=whole)
    assert [text.count("⟦") for text in texts(data)] == [1, 1, 1]
    assert [text.count("reply") for text in texts(data)] == [1, 1, 1]
    pairs = dataset(talk(weights), overlong="split", max_length=2 * whole - 8)
    learned = [text for each in texts(pairs) for text in each.split("⟦")[1:]]
    assert [text.partition("⟧")[0] for text in learned] == [
        f"reply {i}<|end|>" for i, weight in enumerate(weights) if weight
    ]


def test_weights_of_what_is_no_reply() -> None:
    plain = dataset(talk([1])).fingerprint
    for weight in (None, 0, 0.0):
        data = dataset(talk([1], weight=weight))
        assert data.fingerprint == plain
        assert unused_notes([data]) == []
    assert unused_notes([dataset(talk([1], weight=1))]) == [
        "d.jsonl: not used: the key 'weight' of messages that are no replies (1 row)."
    ]
    row = [Row("d.jsonl, line 1", talk([1], weight=0))]
    (problem,) = tokenize(row, ENCODER, RowSettings(loss_on="all")).faults.problems
    assert str(problem) == (
        "d.jsonl, line 1: messages[1] has the weight 0, but is no reply, and all is to be learned."
    )


# Reasoning


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_comes_before_a_reply_where_the_model_has_it(key: str) -> None:
    user, reply = FORMS[3]["messages"]
    row = {"messages": [user | {key: ""}, reply | {key: " Hm.\n"}]}
    data = dataset(row, encoder=THINKING)
    assert texts(data) == [
        "<|user|>a<|end|><|assistant|>⟦<think>\nHm.\n</think>\n\nb<|end|>⟧",
    ]
    assert unused_notes([data]) == []
    without = dataset(row)
    assert without.fingerprint == dataset(FORMS[3]).fingerprint
    assert unused_notes([without]) == [
        f"d.jsonl: not used: the key {key!r} of messages (1 row).",
    ]


@pytest.mark.parametrize("encoder", [ENCODER, THINKING])
@pytest.mark.parametrize("empty", EMPTY)
def test_no_reasoning_is_nothing(encoder: RowEncoder, empty: Any) -> None:
    messages = [message | {"reasoning_content": empty} for message in FORMS[3]["messages"]]
    data = dataset({"messages": messages}, encoder=encoder)
    assert data.fingerprint == dataset(FORMS[3]).fingerprint
    assert unused_notes([data]) == []


def test_reasoning_that_stands_in_the_reply_already_is_not_put_there_twice() -> None:
    user, reply = FORMS[3]["messages"]
    reply = reply | {"content": "<think>Hm.</think>b"}
    data = dataset({"messages": [user, reply | {"reasoning": "Hm."}]}, encoder=THINKING)
    assert data.fingerprint == dataset({"messages": [user, reply]}, encoder=THINKING).fingerprint
    assert unused_notes([data]) == ["d.jsonl: not used: the key 'reasoning' of messages (1 row)."]


# ShareGPT, and calls

CALL = {"name": "add", "arguments": {"a": 1}}
TOOLS = [{"name": "add", "description": "Adds.", "parameters": {"a": "int"}}]
PLAIN: list[dict[str, Any]] = [
    {"role": "user", "content": "Add."},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It is 2."},
]


@pytest.mark.parametrize("value", [json.dumps(CALL), CALL, [CALL], json.dumps([CALL])])
@pytest.mark.parametrize("result", ["observation", "function_response", "function", "tool"])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_calls_of_sharegpt(value: Any, result: str, tools: Any) -> None:
    said = [
        {"from": "human", "value": "Add."},
        {"from": "function_call", "value": value},
        {"from": result, "value": "2"},
        {"from": "gpt", "value": "It is 2."},
    ]
    expected = {"messages": PLAIN, "tools": TOOLS}
    alike({"conversations": said, "tools": tools}, expected)
    alike({"messages": said, "tools": tools}, expected)


@pytest.mark.parametrize("arguments", [CALL["arguments"], json.dumps(CALL["arguments"])])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_calls_as_openai_wrote_them_first(arguments: Any, content: dict[str, Any]) -> None:
    call = {"role": "assistant", "function_call": {"name": "add", "arguments": arguments}}
    said = [PLAIN[0], call | content, PLAIN[2] | {"role": "function", "name": "add"}, PLAIN[3]]
    plain = [*PLAIN[:2], PLAIN[2] | {"name": "add"}, PLAIN[3]]
    alike({"messages": said, "tools": TOOLS}, {"messages": plain, "tools": TOOLS})


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(
                ["role", "from", "content", "value", "weight", "function_call", "reasoning", "x"]
            ),
            st.sampled_from(
                [None, "", "a", "user", "human", "gpt", "function_call", 0, 1, 2, [], [1], {}, CALL]
            ),
        ),
        max_size=3,
    )
)
def test_whatever_keys_a_message_has_the_row_is_read_or_its_fault_is_said(said: list[Any]) -> None:
    for thinks in (False, True):
        with contextlib.suppress(RowError, PromptError):
            read_content({"messages": said}, {}, thinks=thinks)
