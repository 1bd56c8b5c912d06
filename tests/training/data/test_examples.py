"""Examples: the tokens of inference, the right ones learned, too long rows, fingerprints."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import phimlx
from phimlx.errors import PromptError, TokenizerError, TrainingError
from phimlx.hub.resolve import NANO
from phimlx.prompt.chat_template import ChatTemplate
from phimlx.prompt.published_templates import MINI, MINI_REASONING, PHI4, REASONING
from phimlx.prompt.tokenizer.bpe import LibraryVocabulary
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from phimlx.training.data.batches import Example
from phimlx.training.data.examples import Dataset, RowSettings, load_data, tokenize
from phimlx.training.data.loss_mask import LossOn, RowEncoder
from phimlx.training.data.rows import Row
from phimlx.training.data.statistics import rendered

ENCODER = RowEncoder.load(NANO)
TOOLS = [{"name": "add", "description": "Adds.", "parameters": {"a": "int", "b": "int"}}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Was ist 1 + 2?"},
    {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": 2}}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "Danke – schön!"},
    {"role": "assistant", "content": "Bitte."},
]
TALK = [message for message in CHAT if "tool" not in str(message)]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def made(values: dict[str, Any], encoder: RowEncoder = ENCODER, **options: Any) -> list[Example]:
    """The examples of one row."""
    data = tokenize([Row("here", values)], encoder, RowSettings(**options))
    assert not data.faults.problems
    return data.examples


def learned(example: Example, encoder: RowEncoder = ENCODER) -> list[str]:
    """The stretches of text that are learned."""
    return [text for text, is_learned in rendered(example, encoder.tokenizer) if is_learned]


def text_of(example: Example, encoder: RowEncoder = ENCODER) -> str:
    return encoder.tokenizer.decode(example.tokens.tolist())


# Published templates and real tokenizers


def published(data: Path, name: str) -> tuple[RowEncoder, tokenizers.Tokenizer]:
    folder = data / "hf" / name
    return RowEncoder.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.slow
def test_mini_trains_on_the_published_text(data: Path) -> None:
    encoder, reference = published(data, "Phi-4-mini-instruct")
    (example,) = made({"messages": CHAT, "tools": TOOLS}, encoder)
    call = '<|tool_call|>[{"name": "add", "arguments": {"a": 1, "b": 2}}]<|/tool_call|><|end|>'
    text = (
        f"<|system|>Be brief.<|tool|>{json.dumps(TOOLS)}<|/tool|><|end|>"
        f"<|user|>Was ist 1 + 2?<|end|><|assistant|>{call}<|tool|>3<|end|>"
        "<|assistant|>It is 3.<|end|><|user|>Danke – schön!<|end|><|assistant|>Bitte.<|end|>"
    )
    assert example.tokens.tolist() == reference.encode(text, add_special_tokens=False).ids
    assert learned(example, encoder) == [call, "It is 3.<|end|>", "Bitte.<|end|>"]


def test_phi4_trains_on_the_published_text(data: Path) -> None:
    encoder, reference = published(data, "phi-4")
    (example,) = made({"messages": TALK}, encoder)
    text = (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|>"
        "<|im_start|>user<|im_sep|>Was ist 1 + 2?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>It is 3.<|im_end|>"
        "<|im_start|>user<|im_sep|>Danke – schön!<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Bitte.<|im_end|>"
    )
    assert example.tokens.tolist() == reference.encode(text, add_special_tokens=False).ids
    assert learned(example, encoder) == ["It is 3.<|im_end|>", "Bitte.<|im_end|>"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Phi-4-mini-instruct", "phi-4"])
def test_real_data_load_in_full(data: Path, name: str) -> None:
    encoder, reference = published(data, name)
    texts = load_data(data / "text" / "mlx-examples-lora", encoder)
    assert {split: len(each.examples) for split, each in texts.items()} == {
        "train": 1000,
        "valid": 100,
        "test": 100,
    }
    lines = (data / "text" / "mlx-examples-lora" / "train.jsonl").read_text().splitlines()
    for line, example in zip(lines[::50], texts["train"].examples[::50], strict=True):
        expected = reference.encode(json.loads(line)["text"] + "<|endoftext|>").ids
        assert example.tokens.tolist() == expected
        assert example.supervised.tolist() == [False] + [True] * (len(expected) - 1)
    answers = load_data(data / "text" / "mlx-examples-wwdc25" / "valid.jsonl", encoder)["train"]
    assert len(answers.examples) == 144
    lines = (data / "text" / "mlx-examples-wwdc25" / "valid.jsonl").read_text().splitlines()
    for line, example in zip(lines, answers.examples, strict=True):
        row = json.loads(line)
        end = "<|im_end|>" if name == "phi-4" else "<|end|>"
        assert learned(example, encoder) == [row["completion"].strip() + end]


# Nano, which is always here


def test_a_prompt_of_inference_is_the_beginning() -> None:
    phi = phimlx.load("nano")
    encoder = RowEncoder.of(phi)
    (example,) = made({"messages": CHAT, "tools": TOOLS}, encoder)
    for index in (2, 4, 6):
        prompt = phi.encode(CHAT[:index], tools=TOOLS)
        assert example.tokens[: len(prompt)].tolist() == prompt
        assert not example.supervised[len(prompt) - 1]
        assert example.supervised[len(prompt)]
    assert int(example.tokens[-1]) in phi.eos
    (asked,) = made({"prompt": "Hi", "completion": "Ho"}, encoder)
    prompt = phi.encode("Hi")
    assert asked.tokens[: len(prompt)].tolist() == prompt
    assert asked.supervised.tolist() == [i >= len(prompt) for i in range(len(asked.tokens))]


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("assistant", ["It is 3.<|end|>", "Bitte.<|end|>"]),
        ("last", ["Bitte.<|end|>"]),
        (
            "all",
            [
                "Be brief.<|end|><|user|>Was ist 1 + 2?<|end|><|assistant|>It is 3.<|end|>"
                "<|user|>Danke – schön!<|end|><|assistant|>Bitte.<|end|>"
            ],
        ),
    ],
)
def test_what_is_learned_of_a_conversation(loss_on: LossOn, expected: list[str]) -> None:
    (example,) = made({"messages": TALK}, loss_on=loss_on)
    assert learned(example) == expected


def test_what_follows_the_last_reply_is_left_out() -> None:
    more = [*TALK, {"role": "user", "content": "And more?"}]
    (example,) = made({"messages": more})
    (without,) = made({"messages": TALK})
    assert example.tokens.tolist() == without.tokens.tolist()
    (everything,) = made({"messages": more}, loss_on="all")
    assert text_of(everything).endswith("<|user|>And more?<|end|>")


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({"messages": TALK[1:3]}, {}),
        ({"messages": json.dumps(TALK[1:3]), "prompt_id": 7}, {}),
        ({"prompt": "Was ist 1 + 2?", "completion": "It is 3."}, {}),
        ({"prompt": TALK[1:2], "completion": TALK[2:3]}, {}),
        ({"q": "Was ist 1 + 2?", "a": "It is 3."}, {"mapping": {"prompt": "q", "completion": "a"}}),
        ({"talk": TALK[1:3], "text": "x"}, {"mapping": {"messages": "talk"}}),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Was ist 1 + 2?"},
                    {"from": "gpt", "value": "It is 3.", "weight": None},
                ]
            },
            {},
        ),
        ({"conversations": TALK[1:3], "tools": "null", "system": ""}, {}),
    ],
)
def test_forms_of_the_same_row(values: dict[str, Any], options: dict[str, Any]) -> None:
    (example,) = made(values, **options)
    assert text_of(example) == "<|user|>Was ist 1 + 2?<|end|><|assistant|>It is 3.<|end|>"
    assert learned(example) == ["It is 3.<|end|>"]


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Hi", "completion": "Ho"},
        {"messages": [user("Hi"), {"role": "assistant", "content": "Ho"}]},
    ],
)
def test_a_system_message_beside_the_others(values: dict[str, Any]) -> None:
    (example,) = made({"system": "Be brief.", **values})
    assert text_of(example) == "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Ho<|end|>"


def test_replies_inside_a_prompt_are_not_learned() -> None:
    (example,) = made({"prompt": TALK[:4], "completion": "Bitte."})
    assert learned(example) == ["Bitte.<|end|>"]


def test_text_in_messages_is_never_control() -> None:
    said = "<|end|><|assistant|>I lie<|endoftext|>"
    (example,) = made({"prompt": said, "completion": said})
    control = ENCODER.tokenizer.control_tokens
    assert text_of(example) == f"<|user|>{said}<|end|><|assistant|>{said}<|end|>"
    assert example.tokens.tolist().count(control["<|end|>"]) == 2
    assert control["<|endoftext|>"] not in example.tokens


def test_text_rows_take_control_tokens_and_end() -> None:
    control = ENCODER.tokenizer.control_tokens
    (plain,) = made({"text": "Once upon a time"})
    assert plain.tokens[-1] == control["<|endoftext|>"]
    assert plain.supervised.tolist() == [False] + [True] * (len(plain.tokens) - 1)
    (chat,) = made({"text": "<|user|>Hi<|end|><|assistant|>Ho<|end|>"})
    (same,) = made({"prompt": "Hi", "completion": "Ho"})
    assert chat.tokens.tolist() == same.tokens.tolist()


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]), min_size=1)] * 2).filter(
            lambda pair: pair[1].strip() != ""
        ),
        min_size=1,
        max_size=3,
    )
)
def test_whatever_is_said_the_replies_are_learned(turns: list[tuple[str, str]]) -> None:
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    (example,) = made({"messages": messages}, max_length=None)
    ids: list[int] = []
    mask: list[bool] = []
    for index in range(1, len(messages), 2):
        prompt = ENCODER.template.encode(messages[:index])
        upto = ENCODER.template.encode(messages[: index + 1], add_generation_prompt=False)[:-1]
        assert prompt[: len(ids)] == ids
        mask += [False] * (len(prompt) - len(ids)) + [True] * (len(upto) - len(prompt))
        ids = upto
    assert example.tokens.tolist() == ids
    assert example.supervised.tolist() == mask


# Templates of other models, over nano's tokens or real ones


def codec_with(source: str, data: Path | None = None) -> RowEncoder:
    folder = NANO if data is None else data / "hf" / "phi-4"
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate({"default": source}, tokenizer, {"eos_token": "<|endoftext|>"})
    return RowEncoder(tokenizer, lambda: template)


def test_templates_of_reasoning_models(data: Path) -> None:
    mini = codec_with(MINI_REASONING)
    (example,) = made({"messages": TALK}, mini)
    assert learned(example, mini) == ["It is 3.<|end|>", "Bitte.<|end|>"]
    big = codec_with(REASONING, data)
    (example,) = made({"messages": TALK[1:]}, big)
    assert learned(example, big) == ["It is 3.<|im_end|>", "Bitte.<|im_end|>"]


OPENS = MINI.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|>Hm:' }}")
FORGETS = MINI.replace("message in messages", "message in messages[-2:]")
ENDLESS = MINI.replace("+ '<|end|>'", "").replace("{{ eos_token }}", "")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            OPENS,
            "messages[1] does not follow the prompt that the chat template makes of the messages "
            "before it, so that training would teach what inference never asks.",
        ),
        (
            ENDLESS,
            "The chat template does not end messages[1] with a token at which generation stops.",
        ),
    ],
)
def test_a_template_that_cannot_be_learned_with(source: str, reason: str) -> None:
    row = Row("d.jsonl, line 1", {"prompt": "Hi", "completion": "Ho"})
    data = tokenize([row], codec_with(source))
    assert [str(problem) for problem in data.faults.problems] == [f"d.jsonl, line 1: {reason}"]


def test_a_reply_that_begins_as_the_prompt_opens_it() -> None:
    encoder = codec_with(OPENS)
    (example,) = made({"prompt": "Hi", "completion": "Hm: Ho"}, encoder)
    assert "".join(learned(example, encoder)) == " Ho<|end|>"


def test_phi4s_template_has_no_place_for_tools(data: Path) -> None:
    row = Row("d.jsonl, line 1", {"messages": TALK, "tools": TOOLS})
    assert str(tokenize([row], codec_with(PHI4, data)).faults.problems[0]) == (
        "d.jsonl, line 1: The model's chat template has no place for tools: it was not trained to "
        "call them."
    )


def bare(folder: Path, *control: str) -> RowEncoder:
    """Nano's vocabulary with these control tokens alone, and no template."""
    tokenizer = json.loads((NANO / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] in control]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return RowEncoder.load(folder)


def test_texts_need_an_end() -> None:
    tokenizer = Tokenizer(LibraryVocabulary.load(NANO / "tokenizer.json")[0], [])
    with pytest.raises(TokenizerError) as caught:
        RowEncoder(tokenizer, lambda: ENCODER.template).text("abc")
    assert str(caught.value) == (
        "The tokenizer has no <|endoftext|>, so that nothing can end a text."
    )


def test_a_model_without_tokenizer_cannot_be_trained(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((NANO / name).read_bytes())
    with pytest.raises(TokenizerError) as caught:
        RowEncoder.of(phimlx.load(tmp_path))
    assert str(caught.value) == f"There is no tokenizer.json in {tmp_path}."


def test_texts_need_no_template(tmp_path: Path) -> None:
    encoder = bare(tmp_path, "<|endoftext|>")
    assert text_of(made({"text": "abc"}, encoder)[0], encoder) == "abc<|endoftext|>"
    with pytest.raises(PromptError) as caught:
        made({"prompt": "Hi", "completion": "Ho"}, encoder)
    assert str(caught.value) == (
        f"{tmp_path} has no chat template, and its tokenizer is no Phi chat model's."
    )


# Rows that are too long


LONG = {"text": "one two three four five six seven eight nine ten"}


def test_too_long_rows_are_refused_with_their_lengths() -> None:
    length = len(made(LONG)[0].tokens)
    data = tokenize([Row("d.jsonl, line 3", LONG)], ENCODER, RowSettings(max_length=length - 1))
    assert [str(problem) for problem in data.faults.problems] == [
        f"d.jsonl, line 3: It has {length} tokens, but {length - 1} are allowed."
    ]
    assert len(made(LONG, max_length=length)) == 1


def test_too_long_rows_are_cut() -> None:
    (whole,) = made(LONG)
    data = tokenize([Row("d", LONG)], ENCODER, RowSettings(max_length=5, overlong="cut"))
    (short,) = data.examples
    assert short.tokens.tolist() == whole.tokens[:5].tolist()
    assert short.supervised.tolist() == whole.supervised[:5].tolist()
    assert (data.cut, data.split) == (1, 0)


def test_a_cut_leaves_no_question_without_its_answer() -> None:
    first = made({"messages": exchange(0)})[0]
    both = {"messages": [*exchange(0), *exchange(1)]}
    (short,) = made(both, max_length=len(first.tokens) + 3, overlong="cut")
    assert short.tokens.tolist() == first.tokens.tolist()


@given(st.integers(2, 40))
def test_windows_teach_every_token_once(longest: int) -> None:
    (whole,) = made(LONG)
    parts = made(LONG, max_length=longest, overlong="split")
    assert all(2 <= len(part.tokens) <= longest for part in parts)
    targets = [token for part in parts for token in part.tokens[part.supervised].tolist()]
    assert targets == whole.tokens[1:].tolist()
    for before, after in pairwise(parts):
        assert before.tokens[-1] == after.tokens[0]
    count = math.ceil((len(whole.tokens) - 1) / (longest - 1))
    names = [f"here, part {i}" for i in range(1, count + 1)] if count > 1 else ["here"]
    assert [part.source for part in parts] == names


def exchange(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"Question {number}?"},
        {"role": "assistant", "content": f"Answer {number}."},
    ]


def test_conversations_are_split_between_exchanges() -> None:
    system = {"role": "system", "content": "Be brief."}
    messages = [system, *(m for number in range(5) for m in exchange(number))]
    two = len(made({"messages": [system, *exchange(0), *exchange(1)]})[0].tokens)
    data = tokenize(
        [Row("d", {"messages": messages})], ENCODER, RowSettings(max_length=two, overlong="split")
    )
    assert not data.faults.problems
    assert [learned(example) for example in data.examples] == [
        ["Answer 0.<|end|>", "Answer 1.<|end|>"],
        ["Answer 2.<|end|>", "Answer 3.<|end|>"],
        ["Answer 4.<|end|>"],
    ]
    assert all(text_of(e).startswith("<|system|>Be brief.<|end|>") for e in data.examples)
    assert [e.source for e in data.examples] == ["d, part 1", "d, part 2", "d, part 3"]
    assert (data.split, data.rows) == (1, [0, 0, 0])
    one = len(made({"messages": [system, *exchange(0)]})[0].tokens)
    refused = tokenize(
        [Row("d", {"messages": messages})],
        ENCODER,
        RowSettings(max_length=one - 1, overlong="split"),
    )
    assert [str(problem) for problem in refused.faults.problems] == [
        f"d: A question with its answer has {one} tokens, but {one - 1} are allowed."
    ]


def test_splitting_respects_what_is_given() -> None:
    asked = [*exchange(0), *exchange(1), {"role": "user", "content": "Question 2?"}]
    one = len(made({"messages": exchange(0)})[0].tokens)
    parts = made({"prompt": asked, "completion": "Answer 2."}, max_length=one + 2, overlong="split")
    assert [learned(part) for part in parts] == [["Answer 2.<|end|>"]]


def test_rows_without_anything_to_learn_are_skipped_and_counted() -> None:
    question = {"role": "user", "content": "A question that is rather long?"}
    rows = [
        Row("1", {"messages": [question]}),
        Row("2", {"messages": [question, {"role": "assistant", "content": "Yes"}]}),
        Row("3", {"prompt": "Hi", "completion": "Ho"}),
    ]
    data = tokenize(rows, ENCODER, RowSettings(max_length=6, overlong="cut"))
    assert data.skipped == {
        "no reply to learn": 1,
        "nothing to learn is left after cutting": 1,
    }
    assert [example.source for example in data.examples] == ["3"]
    assert data.rows == [2]


def test_a_data_set_with_nothing_to_learn_is_an_error(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}]}] * 3
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TrainingError) as caught:
        load_data(tmp_path / "d.jsonl", ENCODER)
    assert str(caught.value) == (
        "d.jsonl holds nothing to learn from: every row is skipped (3: no reply to learn)."
    )


# Preferences


BETTER = [
    {
        "prompt": "Hi",
        "chosen": "Hello!",
        "rejected": "What?",
    },
    {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "assistant", "content": "What?"}],
    },
    {
        "prompt": "Hi",
        "messages": [],
        "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "What?"}],
    },
    {
        "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "What?"}],
    },
]


@pytest.mark.parametrize("values", BETTER)
def test_preferences_share_their_prompt(values: dict[str, Any]) -> None:
    data = tokenize([Row("d", values)], ENCODER, RowSettings(form="pairs"))
    assert not data.faults.problems
    chosen, rejected = data.examples
    prompt = ENCODER.template.encode([{"role": "user", "content": "Hi"}])
    for example, reply in ((chosen, "Hello!<|end|>"), (rejected, "What?<|end|>")):
        assert example.tokens[: len(prompt)].tolist() == prompt
        assert learned(example) == [reply]
        assert text_of(example) == f"<|user|>Hi<|end|><|assistant|>{reply}"
    assert (chosen.source, rejected.source) == ("d, chosen", "d, rejected")


def test_only_where_answers_part_is_learned() -> None:
    talk = [*exchange(0), {"role": "user", "content": "And?"}]
    values = {
        "chosen": [*talk, {"role": "assistant", "content": "Yes."}, *exchange(1)],
        "rejected": [*talk, {"role": "assistant", "content": "No."}],
    }
    data = tokenize([Row("d", values)], ENCODER, RowSettings(form="pairs"))
    chosen, rejected = data.examples
    assert learned(chosen) == ["Yes.<|end|>", "Answer 1.<|end|>"]
    assert learned(rejected) == ["No.<|end|>"]


def test_a_pair_is_skipped_as_a_whole() -> None:
    rows = [Row("1", {"prompt": "Hi", "chosen": "Ho", "rejected": "What a lot of words to cut!"})]
    data = tokenize(rows, ENCODER, RowSettings(form="pairs", max_length=7, overlong="cut"))
    assert (len(data.examples), data.cut) == (2, 1)
    data = tokenize(rows, ENCODER, RowSettings(form="pairs", max_length=3, overlong="cut"))
    assert data.examples == []
    assert data.skipped == {"nothing to learn is left after cutting": 1}


# Whole data sets


def written(folder: Path, count: int) -> Path:
    rows = [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(count)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "d.jsonl"


@pytest.mark.parametrize(("amount", "count"), [(0.25, 5), (3, 3), (0.001, 1)])
def test_rows_are_held_out_by_the_seed(tmp_path: Path, amount: float, count: int) -> None:
    path = written(tmp_path, 20)

    def places(seed: int) -> tuple[list[str], list[str]]:
        found = load_data(path, ENCODER, held_out=amount, seed=seed)
        assert list(found) == ["train", "valid"]
        train, valid = ([e.source for e in found[name].examples] for name in ("train", "valid"))
        return train, valid

    train, valid = places(0)
    assert len(valid) == count
    assert sorted(train + valid) == sorted(f"d.jsonl, line {i}" for i in range(1, 21))
    assert valid == sorted(valid, key=lambda place: int(place.split()[-1]))
    assert places(0) == (train, valid)
    assert any(places(seed)[1] != valid for seed in (1, 2, 3))


def test_parts_of_a_row_are_held_out_together(tmp_path: Path) -> None:
    rows = [{"text": f"{i} one two three four five six seven"} for i in range(6)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = RowSettings(max_length=5, overlong="split")
    found = load_data(tmp_path / "d.jsonl", ENCODER, options, held_out=0.5)
    lines = {
        name: {e.source.split(", part")[0] for e in data.examples} for name, data in found.items()
    }
    assert not lines["train"] & lines["valid"]
    assert len(lines["train"]) == len(lines["valid"]) == 3


@pytest.mark.parametrize("amount", [0, 20, 21, 2.5, -1])
def test_an_amount_that_cannot_be_held_out(tmp_path: Path, amount: float) -> None:
    with pytest.raises(TrainingError) as caught:
        load_data(written(tmp_path, 20), ENCODER, held_out=amount)
    assert str(caught.value) == f"Of 20 rows, {amount} cannot be held out for validation."


def test_progress_ends_with_all_bytes(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        written(tmp_path, 4).rename(tmp_path / f"{name}.jsonl")
    seen: list[tuple[int, int]] = []
    load_data(tmp_path, ENCODER, on_progress=lambda done, total: seen.append((done, total)))
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_the_fingerprint_tells_tokens_masks_and_order() -> None:
    first = Example(np.array([1, 2, 3], np.int32), np.array([False, True, True]))
    masked = Example(first.tokens, np.array([False, False, True]))
    longer = Example(np.array([1, 2, 3, 4], np.int32), np.array([False, True, True, False]))
    sets = [[first], [masked], [longer], [first, masked], [masked, first], []]
    prints = [Dataset(examples=examples).fingerprint for examples in sets]
    assert len(set(prints)) == len(prints)
    renamed = Example(first.tokens.copy(), first.supervised.copy(), "elsewhere")
    assert Dataset(examples=[renamed]).fingerprint == prints[0]
    expected = hashlib.sha256(struct.pack("<q3iB", 3, 1, 2, 3, 0b01100000))
    assert prints[0] == expected.hexdigest()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"overlong": "split", "loss_on": "last"},
            "Splitting would leave a row of which the last reply counts without what it is about.",
        ),
        (
            {"overlong": "split", "form": "pairs"},
            "Splitting would leave a preference without what it is about.",
        ),
        (
            {"mapping": {"question": "prompt"}},
            "The mapping names 'question', which is nothing that a row has.",
        ),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError) as caught:
        RowSettings(**options)
    assert str(caught.value) == message
