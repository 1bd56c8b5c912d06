"""`generate --schema`, `--regex`, `--grammar`, `--tool-choice`, on the model that comes along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from phimlx.cli.group import cli
from phimlx.cli.shapes import read_schema_argument
from phimlx.errors import GrammarError

QUESTION = "What is the capital of France?"
TOOLS = [{"name": "stop"}, {"name": "go"}]


def generate(*arguments: object) -> Result:
    given = ["generate", "--model", "nano", "--private", *map(str, arguments)]
    return CliRunner().invoke(cli, given)


def field(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, **more}


@pytest.mark.parametrize(
    ("text", "properties"),
    [
        ("name", {"name": field("string")}),
        ("name, age int", {"name": field("string"), "age": field("integer")}),
        (" a float ,b bool,, c str", {
            "a": field("number"), "b": field("boolean"), "c": field("string"),
        }),
        ("tags [str], n [int]", {
            "tags": field("array", items=field("string")),
            "n": field("array", items=field("integer")),
        }),
        ("name: who, in full\nage int: in years\n", {
            "name": field("string", description="who, in full"),
            "age": field("integer", description="in years"),
        }),
        ("größe float, first-name", {"größe": field("number"), "first-name": field("string")}),
    ],
)  # fmt: skip
def test_the_short_form_names_fields(text: str, properties: dict[str, Any]) -> None:
    assert read_schema_argument(text) == {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


@pytest.mark.parametrize("text", ["", " , ", "name what", "a, a", "a [int", "a int]", "a b c", "!"])
def test_a_short_form_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(GrammarError, match=r"The schema (has|names)"):
        read_schema_argument(text)


def test_a_schema_is_a_file_or_json(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}}
    path = tmp_path / "schema"
    path.write_text(json.dumps(schema))
    assert read_schema_argument(str(path)) == read_schema_argument(json.dumps(schema)) == schema
    for text in (str(tmp_path / "none.json"), '{"a":', "[1]", str(tmp_path)):
        with pytest.raises(GrammarError):
            read_schema_argument(text)


def test_an_answer_has_the_shape_that_is_asked_for(tmp_path: Path) -> None:
    answer = generate("--schema", "big bool", QUESTION)
    assert json.loads(answer.stdout).keys() == {"big"}
    answer = generate("--json", "--schema", '{"enum": ["Rome"]}', QUESTION)
    assert json.loads(answer.stdout)["parsed"] == "Rome"
    assert generate("--regex", "(no|ne)!", QUESTION).stdout in ("no!\n", "ne!\n")
    rules = tmp_path / "rules.lark"
    rules.write_text('start: "ja" | "nein"')
    assert generate("--grammar", rules, QUESTION).stdout in ("ja\n", "nein\n")


def test_a_tool_is_called_where_it_must_be(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(TOOLS))
    answer = generate("--tools", path, "--tool-choice", "go", QUESTION)
    assert json.loads(answer.stdout) == {"name": "go", "arguments": {}}
    assert generate("--tools", path, "--tool-choice", "none", QUESTION).stdout == "Paris\n"
    answer = generate("--tools", path, "--tool-choice", "come", QUESTION)
    assert answer.exit_code == 1
    assert answer.stderr == (
        "Error: tool_choice is 'come', and no tool of that name is offered.\n"
        "Hint: It is one of auto, none, required, or the name of a tool.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--schema", "x", "--regex", "y"], 2, "--schema and --regex are given together"),
        (["--tool-choice", "auto"], 2, "--tool-choice needs --tools."),
        (["--schema", '{"not": {}}'], 1, "keywords that a reply cannot be held to: not."),
        (["--grammar", "none.lark"], 1, "There is no file none.lark."),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], code: int, message: str) -> None:
    answer = generate(*arguments, QUESTION)
    assert (answer.exit_code, answer.stdout) == (code, "")
    assert message in answer.stderr


def test_lines_of_a_file_have_a_shape_of_their_own(tmp_path: Path) -> None:
    source, target = tmp_path / "prompts.jsonl", tmp_path / "replies.jsonl"
    lines = [
        QUESTION,
        {"prompt": QUESTION, "regex": "[a-c]"},
        {"prompt": "a", "schema": {"const": 2}},
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    answer = generate("--prompts", source, "--output", target, "--schema", '{"const": 1}')
    assert answer.exit_code == 0, answer.stderr
    replies = [json.loads(line) for line in target.read_text().splitlines()]
    assert [reply.get("parsed") for reply in replies] == [1, None, 2]
    assert replies[1]["text"] in "abc"
