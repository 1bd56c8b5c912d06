"""Replies: calls in both trained forms, reasoning, and the same outcome however they arrive."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phimlx.prompt.reply_parser import ReplyParser, ReplyPart
from phimlx.prompt.tools import ToolCall

TAG, END = "<|tool_call|>", "<|/tool_call|>"
CALL = '{"name": "get_weather", "arguments": {"city": "Zürich"}}'
WEATHER = ToolCall("get_weather", {"city": "Zürich"})
UNREADABLE = "A tool call could not be read and stays in the text: "


def read(reply: str, tools: bool = True, starts_in_reasoning: bool = False) -> ReplyParser:
    parser = ReplyParser(tools, starts_in_reasoning)
    parts = [*parser.feed(reply), *parser.finish()]
    assert "".join(part.text for part in parts if part.kind == "text") == parser.text
    assert "".join(part.text for part in parts if part.kind == "reasoning") == parser.reasoning
    if len(reply) < 1000:
        slow = ReplyParser(tools, starts_in_reasoning)
        for character in reply:
            slow.feed(character)
        slow.finish()
        assert outcome(slow) == outcome(parser)
    return parser


def outcome(parser: ReplyParser) -> tuple[object, ...]:
    return parser.text, parser.reasoning, parser.tool_calls, parser.warnings


@pytest.mark.parametrize(
    ("reply", "text", "calls"),
    [
        (f"{TAG}[{CALL}]{END}", "", [WEATHER]),
        (f"{TAG}{CALL}{END}", "", [WEATHER]),
        (f"{TAG}\n[ {CALL} ]\n{END}\n", "", [WEATHER]),
        (f"{TAG}[{CALL}, {CALL}]{END}", "", [WEATHER, WEATHER]),
        (f"{TAG}[{CALL}]{END}\n{TAG}[{CALL}]{END}", "", [WEATHER, WEATHER]),
        (f"{TAG}[{CALL}]", "", [WEATHER]),
        (f"functools[{CALL}]", "", [WEATHER]),
        (f"functools [ {CALL}]", "", [WEATHER]),
        (f"functools{CALL}", "", [WEATHER]),
        (f" Let me look. functools[{CALL}] Done.", " Let me look. Done.", [WEATHER]),
        (f"Sure.\n{TAG}[{CALL}]{END}\nDone.", "Sure.\nDone.", [WEATHER]),
        ('functools[{"name": "f", "parameters": {"x": 1}}]', "", [ToolCall("f", {"x": 1})]),
        ('functools[{"name": "f", "arguments": "{\\"x\\": [1]}"}]', "",
         [ToolCall("f", {"x": [1]})]),
        ('functools[{"name": "f"}]', "", [ToolCall("f", {})]),
        ('functools[{"name": "f", "arguments": null}]', "", [ToolCall("f", {})]),
        ('functools[{"name": "f", "arguments": ""}]', "", [ToolCall("f", {})]),
        ('functools[{"type": "function", "function": {"name": "f", "arguments": {}}}]', "",
         [ToolCall("f", {})]),
        ('functools[{"name": "f", "arguments": {"x": "]}\\"[{", "y": {"z": [[]]}}}]!', "!",
         [ToolCall("f", {"x": ']}"[{', "y": {"z": [[]]}})]),
        ('functools[{"name": "f", "arguments": {"x": "a\nb\\\\"}}]', "",
         [ToolCall("f", {"x": "a\nb\\"})]),
        (f'{TAG}[{{"name": "f", "arguments": {{"x": "{END}"}}}}]{END}', "",
         [ToolCall("f", {"x": END})]),
    ],
)  # fmt: skip
def test_calls_are_read(reply: str, text: str, calls: list[ToolCall]) -> None:
    parser = read(reply)
    assert (parser.tool_calls, parser.text, parser.warnings) == (calls, text, [])


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (f"{TAG}[1, 2]{END}", "a call must be an object."),
        (f"{TAG}[]{END}", "it names no tool."),
        (f"{TAG}[{{}}]{END}", "a call has no name."),
        ('functools[{"name": 3}]', "a call has no name."),
        ('functools[{"name": "f", "arguments": [1]}]', "the arguments of f are not an object."),
        ('functools[{"name": "f", "arguments": "[1]"}]', "the arguments of f are not an object."),
        ('functools[{"name": "f", "arguments": "{"}]',
         "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)."),
        ('functools[{"name": "f", "arguments": {"x": NaN}}]', "NaN is not JSON."),
        ("functools[{'name': 'f'}] x",
         "Expecting property name enclosed in double quotes: line 1 column 3 (char 2)."),
        (f"functools[{CALL}, 5]", "a call must be an object."),
        (f"{TAG}get_weather(city='Zürich'){END}", "no JSON follows it."),
        (TAG, "the reply ended inside it."),
        (f"{TAG}\n", "the reply ended inside it."),
        (f"{TAG}[{CALL}", "the reply ended inside it."),
        (f"{TAG}[{CALL}{END} More.", "Expecting ',' delimiter: line 1 column 58 (char 57)."),
        (f"{TAG}[" + "[" * 100_000 + "]" * 100_001, "it is nested too deeply."),
        (f"{TAG}[{{]]",
         "Expecting property name enclosed in double quotes: line 1 column 3 (char 2)."),
    ],
)  # fmt: skip
def test_malformed_calls_stay_in_the_text(reply: str, reason: str) -> None:
    parser = read(reply)
    assert (parser.text, parser.tool_calls) == (reply, [])
    assert parser.warnings == [UNREADABLE + reason]


@pytest.mark.parametrize(
    "reply",
    [
        "Use functools.reduce, or functools[0].",
        "import functools\n[f for f in functools]",
        "functools",
        "functools [",
        "functools[1, 2]",
        "myfunctools" + f"[{CALL}]",
        "x.functools" + f"[{CALL}]",
        "<|tool_cal",
        "<|tool_calls|>",
        "<| tool_call |>[1]",
        "f fu fun func functo",
        "",
        " \n",
    ],
)
def test_mere_mentions_stay_text(reply: str) -> None:
    parser = read(reply)
    assert (parser.text, parser.tool_calls, parser.warnings) == (reply, [], [])


@pytest.mark.parametrize("reply", [f"{TAG}[{CALL}]{END}", f"functools[{CALL}]", f"{TAG}[1]{END}"])
def test_without_tools_nothing_is_a_call(reply: str) -> None:
    parser = read(reply, tools=False)
    assert (parser.text, parser.tool_calls, parser.warnings) == (reply, [], [])


@pytest.mark.parametrize(
    ("reply", "reasoning", "text"),
    [
        ("<think>a b</think>c", "a b", "c"),
        ("\n<think>\na\n\nb\n</think>\n\nc\n", "a\n\nb", "c\n"),
        ("<think></think>c", "", "c"),
        ("<think>never closed", "never closed", ""),
        ("<think>almost </thin", "almost </thin", ""),
        ("<think>a<think>b</think>c</think>d", "a<think>b", "c</think>d"),
        ("The <think> tag opens </think> it.", "", "The <think> tag opens </think> it."),
        (" leading space", "", " leading space"),
        ("<thinking>x", "", "<thinking>x"),
        ("<thi", "", "<thi"),
        ("x</think>y", "", "x</think>y"),
        (f"<think>{TAG}[{CALL}]{END}</think>x", f"{TAG}[{CALL}]{END}", "x"),
    ],
)
def test_reasoning(reply: str, reasoning: str, text: str) -> None:
    parser = read(reply)
    assert (parser.reasoning, parser.text, parser.tool_calls) == (reasoning, text, [])


@pytest.mark.parametrize(
    ("reply", "reasoning", "text"),
    [
        (" a</think> b", "a", "b"),
        ("never closed ", "never closed ", ""),
        ("</think>b", "", "b"),
    ],
)
def test_a_reply_that_starts_in_reasoning(reply: str, reasoning: str, text: str) -> None:
    parser = read(reply, starts_in_reasoning=True)
    assert (parser.reasoning, parser.text) == (reasoning, text)


@pytest.mark.parametrize(
    ("said", "reply", "reasoning", "text"),
    [
        ("The answer", " is 7.", "", " is 7."),
        ("The answer", "<think>is</think> 7.", "", "<think>is</think> 7."),
        (" \n", "<think> a </think> b", "a", "b"),
        ("<think>", "\nhm </think> 7", "hm", "7"),
        ("<think>\nLet me", " see.\n</think>\n7", " see.", "7"),
        ("<think>\nLet me ", "\n see", "\n see", ""),
        ("<think>hm</think>", "\n\n7", "", "7"),
        ("<think>hm</think>\n7", "\n8", "", "\n8"),
        ("So <think>", " a</think>b", "", " a</think>b"),
    ],
)
def test_a_reply_that_continues(said: str, reply: str, reasoning: str, text: str) -> None:
    for pieces in ([reply], reply):
        parser = ReplyParser(tools=True, said=said)
        for piece in pieces:
            parser.feed(piece)
        parser.finish()
        assert (parser.reasoning, parser.text) == (reasoning, text)


def test_calls_after_what_was_said() -> None:
    parser = ReplyParser(tools=True, said="<think>hm")
    parser.feed(f" yes</think>Let me look.{TAG}[{CALL}]{END}")
    parser.finish()
    assert (parser.reasoning, parser.text) == (" yes", "Let me look.")
    assert parser.tool_calls == [WEATHER]


def test_calls_after_reasoning() -> None:
    parser = read(f"<think>I need it.</think>\n{TAG}[{CALL}]{END}")
    assert (parser.reasoning, parser.text, parser.tool_calls) == ("I need it.", "", [WEATHER])


def test_tags_never_leak_and_text_is_never_delayed() -> None:
    parser = ReplyParser(tools=True)
    told = [
        parser.feed(piece) for piece in ["<th", "ink>Hm", " </", "b", "> x", "</thi", "nk>", "Yes"]
    ]
    said = ["", "Hm", "", " </b", "> x", "", ""]
    reasoning = [[ReplyPart("reasoning", text)] if text else [] for text in said]
    reasoning.append([ReplyPart("text", "Yes")])
    assert told == reasoning
    told = [
        parser.feed(piece)
        for piece in [
            " a",
            " f",
            "un ",
            "func",
            "tools.",
            "<|too",
            "x",
            "<|tool_call|>",
            "[{",
            '"name": "f"}]',
            END,
        ]
    ]
    text = ["a", "", " fun ", "", "functools.", "", "<|toox", "", "", "", ""]
    assert ["".join(part.text for part in parts).lstrip() for parts in told] == [
        t.lstrip() for t in text
    ]
    assert parser.finish() == []
    assert parser.tool_calls == [ToolCall("f", {})]


def test_text_arrives_at_once() -> None:
    parser = ReplyParser(tools=True)
    for word in ["The", " quick", " brown", " dog,", " 3 < 4", " [", "{", "}", "]"]:
        assert parser.feed(word) == [ReplyPart("text", word)]


def cut(reply: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(reply) + 1) for place in places), len(reply)]
    return [reply[start:end] for start, end in pairwise(edges)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.just(END),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
calls = st.builds(
    lambda name, arguments: json.dumps({"name": name, "arguments": arguments}),
    st.text(min_size=1, max_size=4),
    st.dictionaries(st.text(max_size=3), json_values, max_size=3),
)
pieces = (
    st.sampled_from(
        [TAG, END, "functools", "functools[", "<think>", "</think>", "<|tool_ca", "</th", "[", "]",
         "{", "}", '"', "\\", " ", "\n", "f", "x", ".", f"functools[{CALL}]", f"{TAG}[{CALL}]{END}"]
    )
    | st.text(max_size=4)
    | calls
    | calls.map(lambda call: f"{TAG}[{call}]{END}")
    | calls.map(lambda call: f"functools[{call}]")
)  # fmt: skip
replies = st.lists(pieces, max_size=8).map("".join)


@given(replies, st.lists(st.integers(0, 10_000), max_size=12), st.booleans(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_outcome_does_not_depend_on_the_cuts(
    reply: str, places: list[int], tools: bool, starts_in_reasoning: bool
) -> None:
    whole = read(reply, tools, starts_in_reasoning)
    pieces = ReplyParser(tools, starts_in_reasoning)
    parts = [part for piece in cut(reply, places) for part in pieces.feed(piece)]
    parts += pieces.finish()
    joined = {
        kind: "".join(part.text for part in parts if part.kind == kind)
        for kind in ("text", "reasoning")
    }
    assert all(bool(part.text) != bool(part.tool_calls) for part in parts)
    assert [call for part in parts for call in part.tool_calls] == whole.tool_calls
    assert joined == {"text": whole.text, "reasoning": whole.reasoning}
    assert (pieces.tool_calls, pieces.warnings) == (whole.tool_calls, whole.warnings)


@given(
    st.lists(
        st.tuples(
            st.text(min_size=1, max_size=8),
            st.dictionaries(st.text(max_size=4), json_values, max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_every_well_formed_call_is_read(
    given_calls: list[tuple[str, dict[str, Any]]], tag: bool
) -> None:
    listed = json.dumps(
        [{"name": name, "arguments": arguments} for name, arguments in given_calls],
        ensure_ascii=False,
    )
    parser = read(f"Hm. {TAG}{listed}{END}" if tag else f"Hm. functools{listed}")
    assert parser.tool_calls == [ToolCall(*call) for call in given_calls]
    assert parser.text == "Hm. "


TOKENS = 32_000


@pytest.mark.parametrize(
    ("opening", "piece", "most"),
    [
        ("<think>", " thinking", 16),
        ("<think>", " ", 16),
        ("<think>", "</thin", 16),
        ("", "  ", 16),
        ("", " text", 16),
        ("", "<|tool_cal", 16),
        (TAG, " ", 128),
        ("functools", " ", 128),
        ("functools [", " ", 128),
        (f"{TAG}[{CALL}]", " ", 16),
        (f"{TAG}[{CALL}]{END}", "\n", 16),
        (f"{TAG}[", '{"name": "f"}, ', 16),
        (f'{TAG}[{{"name": "', "\\\\x", 16),
        (f'{TAG}[{{"name": "', "\\", 16),
        (f"{TAG}[", "<|/tool_cal", 16),
    ],
)
def test_a_piece_costs_its_own_length(opening: str, piece: str, most: int) -> None:
    """What is looked at again with the next piece is bounded, and nothing is joined unread."""
    parser = ReplyParser(tools=True)
    parser.feed(opening)
    handed_on = 0
    for _ in range(TOKENS):
        handed_on += sum(len(part.text) for part in parser.feed(piece))
        assert len(parser._held) <= most
    assert handed_on <= len(opening) + TOKENS * len(piece)
    reply = opening + piece * TOKENS
    rest = parser.finish()
    whole = ReplyParser(tools=True)
    whole.feed(reply)
    whole.finish()
    assert outcome(parser) == outcome(whole)
    total = len(parser.text) + len(parser.reasoning)
    assert handed_on + sum(len(part.text) for part in rest) == total


@given(st.lists(st.sampled_from([TAG, "functools", " " * 63, " " * 2, "[", "{", "x"]), max_size=9))
@settings(max_examples=200, deadline=None)
def test_white_space_before_a_call_is_bounded_however_it_arrives(pieces: list[str]) -> None:
    reply = "".join(pieces)
    parser = ReplyParser(tools=True)
    for piece in pieces:
        parser.feed(piece)
    parser.finish()
    assert outcome(parser) == outcome(read(reply))


@pytest.mark.parametrize("starts_in_reasoning", [False, True])
@pytest.mark.parametrize(
    "reply",
    ["<think>a</think>b", " <think> a ", "a</think>b", f"<|tool_call|>{CALL}<|/tool_call|>"],
)
def test_a_plain_reply_is_text_throughout(reply: str, starts_in_reasoning: bool) -> None:
    parser = ReplyParser(tools=True, starts_in_reasoning=starts_in_reasoning, plain=True)
    parts = [part for letter in reply for part in parser.feed(letter)] + parser.finish()
    assert "".join(part.text for part in parts) == parser.text == reply
    assert (parser.reasoning, parser.tool_calls, parser.warnings) == ("", [], [])
