"""Broken data sets, each with what is said of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from phimlx.errors import TrainingError
from phimlx.hub.resolve import NANO
from phimlx.training.data.examples import RowSettings, load_data
from phimlx.training.data.faults import FIRST, SHOWN, DataError
from phimlx.training.data.loss_mask import RowEncoder

ENCODER = RowEncoder.load(NANO)

GOOD = b'{"prompt": "Hi", "completion": "Ho"}\n'
MENDED = "Mend what is named, or leave it out of the data."
KNOWN = (
    "A row has messages, prompt and completion, instruction and output, or text; other names need "
    "a mapping, such as prompt=question."
)
EXAMPLE = 'A message is {"role": "system" | "user" | "assistant" | "tool", "content": "…"}.'


def line(**values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"


def said(*messages: Any) -> bytes:
    return line(messages=messages)


USER = {"role": "user", "content": "Hi"}

# The file's name, what is in it, what is said, and the next step.
BROKEN: dict[str, tuple[str, bytes, str, str]] = {
    "empty file": ("d.jsonl", b"", "d.jsonl: The file is empty.", MENDED),
    "blank lines": ("d.jsonl", b"\n \n", "d.jsonl: The file holds no rows.", MENDED),
    "no rows": ("d.json", b"[]", "d.json: The file holds no rows.", MENDED),
    "header alone": ("d.csv", b"prompt,completion\n", "d.csv: The file holds no rows.", MENDED),
    "comma missing": (
        "d.jsonl",
        GOOD + b'{"prompt": "Hi" "completion": "Ho"}\n' + GOOD,
        "d.jsonl, line 2: No JSON at column 17: Expecting ',' delimiter.",
        MENDED,
    ),
    "last line cut in a string": (
        "d.jsonl",
        GOOD + b'{"prompt": "Hi", "comple',
        "d.jsonl, line 2: The file ends in the middle of this row.",
        MENDED,
    ),
    "last line cut after a value": (
        "d.jsonl",
        GOOD + b'{"prompt": "Hi",',
        "d.jsonl, line 2: The file ends in the middle of this row.",
        MENDED,
    ),
    "no object": (
        "d.jsonl",
        GOOD + b'["Hi", "Ho"]\n',
        "d.jsonl, line 2: A row is a JSON object, but this is ['Hi', 'Ho'].",
        MENDED,
    ),
    "JSON called JSONL": (
        "d.jsonl",
        b'[\n  {"text": "a"}\n]\n',
        "d.jsonl: The file is one JSON list, not a JSON object on each line; its name should end "
        "in .json.",
        MENDED,
    ),
    "not a number": (
        "d.jsonl",
        b'{"text": NaN}\n',
        "d.jsonl, line 1: NaN is not JSON.",
        MENDED,
    ),
    "Latin-1": (
        "d.jsonl",
        GOOD + '{"text": "Grüße"}\n'.encode("latin-1"),
        "d.jsonl, line 2: Column 13 is not UTF-8 text.",
        MENDED,
    ),
    "UTF-16": (
        "d.jsonl",
        '{"text": "a"}\n'.encode("utf-16"),
        "d.jsonl: The file is UTF-16 text; save it as UTF-8.",
        MENDED,
    ),
    "nested too deeply": (
        "d.jsonl",
        b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n",
        "d.jsonl, line 1: It is nested too deeply.",
        MENDED,
    ),
    "JSON with a fault": (
        "d.json",
        b'[\n  {"text": "a"},\n  {"text" "b"}\n]\n',
        "d.json, line 3: No JSON at column 11: Expecting ':' delimiter.",
        MENDED,
    ),
    "JSON that ends": (
        "d.json",
        b'[\n  {"text": "a"},\n  {"text": "b"}\n',
        "d.json: The file ends in the middle of a value.",
        MENDED,
    ),
    "JSON of something else": (
        "d.json",
        b'{"rows":\n [{"text": "a"}]}',
        'd.json: The file holds neither a list of rows nor {"data": [rows]}.',
        MENDED,
    ),
    "JSON row no object": (
        "d.json",
        b'[{"text": "a"}, "b"]',
        "d.json, row 2: A row is a JSON object, but this is 'b'.",
        MENDED,
    ),
    "CSV header twice": (
        "d.csv",
        b"prompt,completion,prompt\na,b,c\n",
        "d.csv, line 1: The header names the column 'prompt' twice.",
        MENDED,
    ),
    "CSV header unnamed": (
        "d.csv",
        b" ,,\na,b,c\n",
        "d.csv, line 1: No column of the header has a name.",
        MENDED,
    ),
    "CSV columns missing": (
        "d.csv",
        b'prompt,completion\n"a\nb",c\nd\n',
        "d.csv, line 4: It has 1 column, but the header has 2.",
        MENDED,
    ),
    "CSV quotes": (
        "d.csv",
        b'prompt,completion\na,b\n"c"d,e\n',
        "d.csv, line 3: This is no CSV: ',' expected after '\"'.",
        MENDED,
    ),
    "CSV not UTF-8": (
        "d.csv",
        "text\na\nGrüße\n".encode("latin-1"),
        "d.csv, line 3: This is not UTF-8 text.",
        MENDED,
    ),
    "CSV by semicolons": (
        "d.csv",
        b"question;answer\na;b\n",
        "d.csv, line 2: It has 'question', 'answer', from which nothing can be learned.",
        KNOWN,
    ),
    "CSV cell empty": (
        "d.csv",
        b"prompt,completion\na,\n",
        "d.csv, line 2: 'completion' is empty.",
        MENDED,
    ),
    "parquet that is none": (
        "d.parquet",
        GOOD,
        "d.parquet: The file is damaged, or no parquet.",
        MENDED,
    ),
    "no known key": (
        "d.jsonl",
        line(question="Hi", answer="Ho"),
        "d.jsonl, line 1: It has 'question', 'answer', from which nothing can be learned.",
        KNOWN,
    ),
    "no key": (
        "d.jsonl",
        line(),
        "d.jsonl, line 1: It has no keys at all, from which nothing can be learned.",
        KNOWN,
    ),
    "prompt alone": (
        "d.jsonl",
        line(prompt="Hi"),
        "d.jsonl, line 1: It has 'prompt', from which nothing can be learned.",
        KNOWN,
    ),
    "preferences": (
        "d.jsonl",
        line(prompt="Hi", chosen="a", rejected="b"),
        "d.jsonl, line 1: This is a better and a worse answer, which only training by preference "
        "takes.",
        "Train with --dpo, or name the answer: completion=chosen.",
    ),
    "null": (
        "d.jsonl",
        line(prompt="Hi", completion=None),
        "d.jsonl, line 1: 'completion' is None, not text.",
        MENDED,
    ),
    "a number": (
        "d.jsonl",
        line(text=7),
        "d.jsonl, line 1: 'text' is 7, not text.",
        MENDED,
    ),
    "white space": (
        "d.jsonl",
        line(text=" \n"),
        "d.jsonl, line 1: 'text' is empty.",
        MENDED,
    ),
    "messages that are text": (
        "d.jsonl",
        line(messages="Hi"),
        "d.jsonl, line 1: 'messages' is text, but no JSON list.",
        MENDED,
    ),
    "messages that are an object": (
        "d.jsonl",
        line(messages=USER),
        "d.jsonl, line 1: 'messages' is {'role': 'user', 'content': 'Hi'}, not a list.",
        MENDED,
    ),
    "messages that are null": (
        "d.jsonl",
        line(messages=None),
        "d.jsonl, line 1: 'messages' is empty.",
        MENDED,
    ),
    "no messages": (
        "d.jsonl",
        said(),
        "d.jsonl, line 1: The conversation is empty.",
        "Give at least one message.",
    ),
    "unknown role": (
        "d.jsonl",
        said(USER, {"role": "bot", "content": "Ho"}),
        "d.jsonl, line 1: messages[1] has the role 'bot'; a role is one of system, user, "
        "assistant, tool.",
        EXAMPLE,
    ),
    "no role": (
        "d.jsonl",
        said({"content": "Ho"}),
        "d.jsonl, line 1: messages[0] has no role; a role is one of system, user, assistant, tool.",
        EXAMPLE,
    ),
    "message of text": (
        "d.jsonl",
        said(USER, "Ho"),
        "d.jsonl, line 1: messages[1] is not an object.",
        EXAMPLE,
    ),
    "content of a number": (
        "d.jsonl",
        said(USER, {"role": "assistant", "content": 7}),
        "d.jsonl, line 1: messages[1] is a message whose content is not text.",
        EXAMPLE,
    ),
    "content that is null": (
        "d.jsonl",
        said({"role": "user", "content": None}),
        "d.jsonl, line 1: messages[0] is a message without content.",
        EXAMPLE,
    ),
    "weight between": (
        "d.jsonl",
        said(USER, {"role": "assistant", "content": "Ho", "weight": 0.5}),
        "d.jsonl, line 1: messages[1] has the weight 0.5; it must be 0 or 1.",
        "A reply of weight 0 is read, but not learned.",
    ),
    "weight in words": (
        "d.jsonl",
        said(USER, {"role": "assistant", "content": "Ho", "weight": "0"}),
        "d.jsonl, line 1: messages[1] has the weight '0'; it must be 0 or 1.",
        "A reply of weight 0 is read, but not learned.",
    ),
    "function_call without JSON": (
        "d.jsonl",
        line(
            conversations=[
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": "f("},
            ]
        ),
        "d.jsonl, line 1: conversations[1] is a function_call, but no JSON.",
        MENDED,
    ),
    "input below a list": (
        "d.jsonl",
        line(instruction=[USER], input="x", output="Ho"),
        "d.jsonl, line 1: 'instruction' is a list of messages, which 'input' cannot be added to.",
        MENDED,
    ),
    "empty reply": (
        "d.jsonl",
        said(USER, {"role": "assistant", "content": " "}),
        "d.jsonl, line 1: messages[1] is a reply without text and without calls.",
        MENDED,
    ),
    "reply to nothing": (
        "d.jsonl",
        said({"role": "assistant", "content": "Ho"}),
        "d.jsonl, line 1: messages[0] is a reply to nothing.",
        "Put a user's message first.",
    ),
    "picture": (
        "d.jsonl",
        said({"role": "user", "content": [{"type": "image", "image": "a.png"}]}),
        "d.jsonl, line 1: messages[0] has a picture or a sound, and the model reads text alone.",
        "Train nano-multimodal, which comes along, or phi-4-multimodal.",
    ),
    "bad call": (
        "d.jsonl",
        said(USER, {"role": "assistant", "tool_calls": [{"arguments": {}}]}),
        "d.jsonl, line 1: messages[1] has tool_calls that are no calls: a call has no name.",
        'A call is {"name": …, "arguments": {…}}.',
    ),
    "bad tool": (
        "d.jsonl",
        line(messages=[USER, {"role": "assistant", "content": "Ho"}], tools=[{"name": ""}]),
        "d.jsonl, line 1: tools[0] has no name.",
        'A tool is {"name": …, "description": …, "parameters": {JSON schema}}.',
    ),
    "two system messages": (
        "d.jsonl",
        line(messages=[{"role": "system", "content": "a"}, USER], system="b"),
        "d.jsonl, line 1: It has a system message in its messages and 'system'.",
        MENDED,
    ),
    "tools that are no list": (
        "d.jsonl",
        line(messages=[USER, {"role": "assistant", "content": "Ho"}], tools={"name": "f"}),
        "d.jsonl, line 1: 'tools' is {'name': 'f'}, not a list.",
        MENDED,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_said_of_broken_data(tmp_path: Path, name: str) -> None:
    file, content, message, hint = BROKEN[name]
    if file.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_data(tmp_path / file, ENCODER)
    assert (str(caught.value), caught.value.hint) == (message, hint)
    assert caught.value.count == 1


PAIRS: dict[str, tuple[bytes, str, str]] = {
    "no pair": (
        GOOD,
        "It has 'prompt', 'completion', from which nothing can be learned.",
        "A row has prompt, chosen and rejected; other names need a mapping, such as chosen=better.",
    ),
    "the same": (
        line(prompt="Hi", chosen="a", rejected="a"),
        "The chosen and the rejected answer are the same.",
        MENDED,
    ),
    "no prompt": (
        line(chosen="a", rejected="b"),
        "The chosen and the rejected answer belong to no common prompt.",
        "A row has prompt, chosen and rejected; other names need a mapping, such as chosen=better.",
    ),
    "another prompt": (
        line(prompt="Who?", chosen=[USER, {"role": "assistant", "content": "a"}], rejected="b"),
        "The prompt is no part of 'chosen'.",
        MENDED,
    ),
    "one is null": (
        line(prompt="Hi", chosen="a", rejected=None),
        "'rejected' is None, not text.",
        MENDED,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_said_of_broken_preferences(tmp_path: Path, name: str) -> None:
    content, reason, hint = PAIRS[name]
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_data(tmp_path / "d.jsonl", ENCODER, RowSettings(form="pairs"))
    assert (str(caught.value), caught.value.hint) == (f"d.jsonl, line 1: {reason}", hint)


def test_a_mapping_whose_key_is_missing(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(line(question="Hi", reply="Ho"))
    mapping = {"prompt": "question", "completion": "answer"}
    with pytest.raises(DataError) as caught:
        load_data(tmp_path / "d.jsonl", ENCODER, RowSettings(mapping=mapping))
    assert str(caught.value) == ("d.jsonl, line 1: It has no 'answer', but 'question', 'reply'.")


def test_all_rows_of_all_files_are_checked_at_once(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(GOOD + b"{\n" + GOOD + line(text=""))
    (tmp_path / "valid.csv").write_bytes(b"text\na\n\n,\n")
    with pytest.raises(DataError) as caught:
        load_data(tmp_path, ENCODER)
    assert str(caught.value) == (
        "The data has 3 faults:\n"
        "  train.jsonl, line 2: No JSON at column 2: Expecting property name enclosed in double "
        "quotes.\n"
        "  train.jsonl, line 4: 'text' is empty.\n"
        "  valid.csv, line 4: It has 2 columns, but the header has 1."
    )
    assert caught.value.hint == MENDED
    assert [problem.place for problem in caught.value.problems] == [
        "train.jsonl, line 2",
        "train.jsonl, line 4",
        "valid.csv, line 4",
    ]


def test_of_many_faults_the_first_are_told_and_all_counted(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(line(text="") * 1500)
    with pytest.raises(DataError) as caught:
        load_data(tmp_path / "d.jsonl", ENCODER)
    first, *others = str(caught.value).splitlines()
    assert first == "The data has 1,500 faults:"
    assert others == [
        "  d.jsonl, lines 1, 2, 3 and 1,497 more: 'text' is empty.",
    ]
    assert (caught.value.count, len(caught.value.problems)) == (1500, FIRST)


@pytest.mark.parametrize(
    ("rows", "lines"), [(2, "1, 2"), (3, "1, 2, 3"), (4, "1, 2, 3 and 1 more")]
)
def test_the_same_fault_is_said_once(rows: int, lines: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(line(text="") * rows + GOOD + b"{}")
    (tmp_path / "valid.jsonl").write_bytes(line(text="") * rows)
    with pytest.raises(DataError) as caught:
        load_data(tmp_path, ENCODER)
    first, one, other, last = str(caught.value).splitlines()
    assert first == f"The data has {2 * rows + 1} faults:"
    assert one == f"  train.jsonl, lines {lines}: 'text' is empty."
    assert other.startswith(f"  train.jsonl, line {rows + 2}: ")
    assert last == f"  valid.jsonl, lines {lines}: 'text' is empty."


def test_faults_that_all_differ_are_counted_beyond_those_shown(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b"".join(line(text=number) for number in range(1000)))
    with pytest.raises(DataError) as caught:
        load_data(tmp_path / "d.jsonl", ENCODER)
    first, *told, rest = str(caught.value).splitlines()
    assert (first, rest) == ("The data has 1,000 faults:", f"  … and {1000 - len(told):,} more.")
    assert len(told) <= SHOWN


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("d.jsonl.gz", "d.jsonl.gz is compressed.", "Unpack it: gunzip {}"),
        ("d.csv.zst", "d.csv.zst is compressed.", "Unpack it: unzstd {}"),
        (
            "d.txt",
            "d.txt is no data file: its name ends in none of .jsonl, .ndjson, .json, .csv, .tsv, "
            ".parquet.",
            "Name it after what it holds, or save it as JSONL: one JSON object on each line.",
        ),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, name: str, message: str, hint: str) -> None:
    path = tmp_path / name
    path.write_bytes(GOOD)
    with pytest.raises(TrainingError) as caught:
        load_data(path, ENCODER)
    assert (str(caught.value), caught.value.hint) == (message, hint.format(path))


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(TrainingError) as caught:
        load_data(tmp_path / "d.parquet", ENCODER)
    assert (str(caught.value), caught.value.hint) == (
        "d.parquet is parquet, which takes a library that is not installed.",
        "Install it with: pip install 'phimlx[parquet]'",
    )


def test_a_folder_named_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").mkdir()
    with pytest.raises(TrainingError) as caught:
        load_data(tmp_path, ENCODER)
    assert str(caught.value) == f"{tmp_path} has no training data: no file train.*."
