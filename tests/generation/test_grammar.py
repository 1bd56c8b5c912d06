"""Replies held to schemas, expressions and grammars, the same on every path of the engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

import phimlx
from phimlx.errors import GenerationError, GrammarError, PromptError
from phimlx.generation import speculation
from phimlx.generation.batch import Batch
from phimlx.generation.engine import Engine
from phimlx.generation.grammar import compiler
from phimlx.generation.options import GenerationOptions
from phimlx.generation.request import Request

QUESTION = "What is the capital of France?"
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}
ROWS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "kind": {"enum": ["a", "b"]}},
        "required": ["name", "kind"],
        "additionalProperties": False,
    },
    "minItems": 3,
    "maxItems": 4,
}
TOOLS: list[dict[str, Any]] = [
    {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
    {
        "name": 'odd "name"\\',
        "parameters": {"properties": {"x": {"enum": [1, "ü"]}}, "additionalProperties": False},
    },
    {"name": "stop"},
]
WILD = {"temperature": 1.5, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


@pytest.fixture(scope="module")
def phi() -> phimlx.Phi:
    return phimlx.load("nano", dtype="float32")


@pytest.fixture
def eager(phi: phimlx.Phi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts wherever two tokens stood before."""
    monkeypatch.setattr(speculation, "SHARES", (0.9,) * len(speculation.SHARES))
    monkeypatch.setattr(phi.engine, "pass_cost", lambda tokens: 1.0)


def request_of(phi: phimlx.Phi, prompt: str = QUESTION, **options: Any) -> Request:
    return phi.request(prompt, GenerationOptions(**{"max_tokens": 200, "seed": 3, **options}))


def test_an_answer_is_what_its_schema_says(phi: phimlx.Phi) -> None:
    reply = phi.generate(QUESTION, schema=CITY, max_tokens=60)
    assert reply.finish_reason == "stop"
    assert reply.parsed == json.loads(reply.text)
    assert sorted(reply.parsed) == ["big", "city"]
    assert reply.tokens[-1] in phi.eos
    assert reply.as_object("nano")["parsed"] == reply.parsed


def test_a_model_class_gives_objects_of_it(phi: phimlx.Phi) -> None:
    class Town(BaseModel):
        big: bool
        rank: bool | None

    reply = phi.generate(QUESTION, schema=Town, max_tokens=60)
    assert isinstance(reply.parsed, Town)
    assert json.loads(reply.text) == reply.parsed.model_dump()


def test_an_answer_matches_an_expression_or_a_grammar(phi: phimlx.Phi) -> None:
    for seed in range(3):
        regex = "[a-f]{3}/\\/?\n\\\n[0-9]"
        reply = phi.generate(QUESTION, regex=regex, max_tokens=20, seed=seed, **WILD)
        assert re.fullmatch("[a-f]{3}//?\n\n[0-9]", reply.text)
        grammar = 'start: "yes" | "no" NUMBER\nNUMBER: /[1-9]/'
        reply = phi.generate(QUESTION, grammar=grammar, max_tokens=20, seed=seed, **WILD)
        assert reply.text in ("yes", *(f"no{digit}" for digit in range(1, 10)))
        assert reply.parsed is None
        assert "parsed" not in reply.as_object("nano")


def test_a_limit_cuts_it_and_says_so(phi: phimlx.Phi) -> None:
    reply = phi.generate(QUESTION, schema=ROWS, max_tokens=9)
    assert (reply.finish_reason, len(reply.tokens), reply.parsed) == ("length", 9, None)
    endless = {"type": "string", "pattern": "^a*$"}
    assert phi.generate(QUESTION, schema=endless, max_tokens=40).finish_reason in ("length", "stop")


def test_a_stop_string_ends_it_too(phi: phimlx.Phi) -> None:
    reply = phi.generate(QUESTION, schema=CITY, stop='", "big', max_tokens=60)
    assert reply.finish_reason == "stop"
    assert reply.text.startswith('{"city": "')
    assert reply.parsed is None


VARIANTS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    WILD,
    {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 0, "repetition_penalty": 1.3},
    {**WILD, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0, "kv_bits": 8},
)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.usefixtures("eager")
def test_drafts_change_no_token(phi: phimlx.Phi, options: dict[str, Any]) -> None:
    drafted = 0
    for seed in range(2):
        given = {"schema": ROWS, "max_tokens": 200, "seed": seed, **options}
        plain = phi.generate(QUESTION, prompt_lookup=False, **given)
        reply = phi.generate(QUESTION, prompt_lookup=True, **given)
        assert reply.tokens == plain.tokens
        assert plain.finish_reason == "stop"
        drafted += reply.stats.accepted_tokens
    assert drafted > 0


@pytest.mark.parametrize("cached", [True, False])
def test_rows_of_a_batch_are_those_alone(phi: phimlx.Phi, cached: bool) -> None:
    """Rows with other grammars and without any, which join and leave between steps."""
    given: list[dict[str, Any]] = [
        {"schema": ROWS, **WILD},
        {"temperature": 0},
        {"schema": CITY, "temperature": 0},
        {"regex": "[a-z]{30}", **WILD},
        {"tools": TOOLS, "tool_choice": "required", **WILD},
        WILD,
        {"schema": {"enum": [True]}, "repetition_penalty": 1.2},
    ]
    if cached:
        given = [{"kv_bits": 8, **each} for each in given]
    prompts = [f"What is {number} + {number}?" * (1 + number % 3) for number in range(len(given))]
    pairs = list(zip(prompts, given, strict=True))
    alone = [
        phi.generate(prompt, max_tokens=200, seed=3, prompt_lookup=False, **each)
        for prompt, each in pairs
    ]
    requests = [request_of(phi, prompt, **each) for prompt, each in pairs]
    engine = Engine(phi.model, max_rows=4)
    engine.add(*requests)
    for _ in range(1000):
        engine.step()
        if all(request.finished for request in requests):
            break
    assert [each.reply.tokens for each in requests] == [each.tokens for each in alone]
    assert [each.reply.finish_reason for each in requests] == [each.finish_reason for each in alone]


def test_plain_replies_need_no_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batch, "_constrain", None)
    plain = phimlx.load("nano")
    assert plain.generate(QUESTION).text == "Paris"
    assert plain._variants.default.reader._grammars == {}


def test_thoughts_come_first_and_are_free(phi: phimlx.Phi) -> None:
    """A prompt that has opened them, and a model that may open them."""
    ids = phi.encode(f"<|user|>{QUESTION}<|end|><|assistant|><think>", raw=True)
    form = {"schema": {"enum": ["Paris", "Rome"]}}
    whole = phi.request(ids, GenerationOptions(**form))
    assert phi.tokenizer is not None
    assert whole.constraint is not None
    said = phi.tokenizer.encode('It {is} "not" Rome.\n</think>\n\n', at_start=False)
    assert whole.constraint.fitting(said) == said
    whole.constraint.advance(said)
    answer = phi.tokenizer.encode('"Rome"', at_start=False)
    assert whole.constraint.fitting(phi.tokenizer.encode("Rome", at_start=False)) == []
    assert whole.constraint.fitting(answer) == answer


def test_calls_are_of_tools_that_are_offered(phi: phimlx.Phi) -> None:
    for choice, names in (
        ("required", {"get_time", 'odd "name"\\', "stop"}),
        ("get_time", {"get_time"}),
        ("stop", {"stop"}),
        ('odd "name"\\', {'odd "name"\\'}),
    ):
        for seed in range(2):
            reply = phi.generate(
                QUESTION, tools=TOOLS, tool_choice=choice, seed=seed, max_tokens=400, temperature=1
            )
            if choice == "required" and reply.finish_reason == "length":
                continue  # call after call
            assert reply.finish_reason == "tool_calls"
            assert reply.text == ""
            assert {call.name for call in reply.tool_calls} <= names
            assert reply.warnings == []
            for call in reply.tool_calls:
                if call.name == "get_time":
                    assert list(call.arguments) == ["city"]
                if call.name == "stop":
                    assert call.arguments == {}


def test_no_call_where_none_is_wanted(phi: phimlx.Phi) -> None:
    assert phi.tokenizer is not None
    called = '<|tool_call|>[{"name": "stop", "arguments": {}}]<|/tool_call|>'
    words = 'So: functools[{"name": "stop", "arguments": {}}]'
    free = request_of(phi, tools=TOOLS).constraint
    none = request_of(phi, tools=TOOLS, tool_choice="none").constraint
    assert free is not None
    assert none is not None
    for text in (called, f"Well. {called}", words):
        tokens = phi.tokenizer.encode(text, control=True, at_start=False)
        assert free.fitting(tokens) == tokens
        assert len(none.fitting(tokens)) < len(tokens)
    for text in ("Use functools.reduce(f, [1]).", "x.functools[0] {}", "é ⚡ 日本"):
        tokens = phi.tokenizer.encode(text, at_start=False)
        assert free.fitting(tokens) == none.fitting(tokens) == tokens
    for text in ('functools[{"name": "rm"', '<|tool_call|>[{"name": "rm"'):
        tokens = phi.tokenizer.encode(text, control=True, at_start=False)
        assert len(free.fitting(tokens)) < len(tokens)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tools": TOOLS}, '<|tool_call|>[{"name": "stop", "arguments": {}}]<|/tool_call|>'),
        ({"tools": TOOLS}, "Paris"),
        ({"schema": {"enum": ["Paris", "Rome"]}}, '"Paris"'),
        ({"regex": "[0-9]+"}, "17"),
    ],
)
def test_drafts_that_end_a_reply_leave_its_grammar_where_it_was(
    options: dict[str, Any], text: str, phi: phimlx.Phi
) -> None:
    """Which a matcher does not that has taken an end back (llguidance 1.9)."""
    tokenizer = phi.tokenizer
    assert tokenizer is not None
    tokens = tokenizer.encode(text, control=True, at_start=False)
    for stop in request_of(phi, **options).stop_tokens:
        for begun in range(len(tokens)):
            constraint = request_of(phi, **options).constraint
            assert constraint is not None
            constraint.advance(tokens[:begun])
            draft = constraint.fitting([*tokens[begun:], stop, *tokens])
            assert draft == tokens[begun:]
            assert len(constraint.allowed(tokenizer.vocab_size, draft)) == 1 + len(draft)
            constraint.advance([*draft, stop])
            assert (constraint.ended, constraint.error) == (True, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schema": {"type": "array", "uniqueItems": True}},
            "The schema has keywords that a reply cannot be held to: uniqueItems.",
        ),
        ({"schema": [1]}, "schema is [1], which is no JSON Schema."),
        ({"schema": {"a": float("nan")}}, "The schema cannot be written as JSON"),
        ({"schema": {"title": "x" * (256 << 10)}}, "The schema has more than 256 kB."),
        ({"schema": {"type": "strin"}}, "A reply cannot be held to this: Invalid type: strin."),
        ({"schema": {"$ref": "http://example.com/x"}}, "A reply cannot be held to this"),
        ({"schema": {"$ref": "#"}}, "A reply cannot be held to this: no text satisfies it."),
        ({"grammar": "start: start"}, "A reply cannot be held to this: no text satisfies it."),
        ({"regex": "("}, "A reply cannot be held to this"),
        ({"regex": ""}, "regex is ''; it must be a text."),
        ({"regex": "a" * 20000}, "The regex has more than 16.0 kB."),
        ({"regex": "(ab){5000}"}, "The regex counts to more than 4,096 repetitions."),
        ({"grammar": "a" * 70000}, "The grammar has more than 64.0 kB."),
        ({"schema": {"pattern": "a{9999}"}}, "The pattern counts to more than 4,096 repetitions."),
        ({"schema": {"multipleOf": 99991}}, "multipleOf is 99991; a reply is held to 10,000"),
        ({"regex": "(" * 65 + ")" * 65}, "The regex is nested deeper than 64 brackets."),
        ({"grammar": "begin: 'x'"}, "A reply cannot be held to this"),
        ({"grammar": 7}, "grammar is 7; it must be a text."),
        ({"regex": "a", "grammar": "b"}, "regex and grammar are given together"),
        ({"tool_choice": "required"}, "tool_choice asks for a call, and no tools are offered."),
        ({"tool_choice": "x", "tools": TOOLS}, "tool_choice is 'x', and no tool of that name"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_held_is_said(
    phi: phimlx.Phi, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(GenerationError) as error:
        phi.stream(QUESTION, **options)
    assert str(error.value).startswith(message)


def test_a_deep_schema_is_refused(phi: phimlx.Phi) -> None:
    schema: dict[str, Any] = {}
    for _ in range(70):
        schema = {"items": schema}
    with pytest.raises(GrammarError, match="nested deeper than 64"):
        phi.stream(QUESTION, schema=schema)
    with pytest.raises(PromptError):
        phi.stream(QUESTION, tools=[{"no": "name"}], tool_choice="auto")


@pytest.mark.parametrize("kind", ["$ref", "object", "items", "allOf"])
def test_references_overflow_no_stack(phi: phimlx.Phi, kind: str) -> None:
    """A chain of them, as long as the limit lets it be, and one that is longer."""
    forms: dict[str, Callable[[str], dict[str, Any]]] = {
        "$ref": lambda next: {"$ref": next},
        "object": lambda next: {"properties": {"x": {"$ref": next}}, "required": ["x"]},
        "items": lambda next: {"items": {"$ref": next}},
        "allOf": lambda next: {"allOf": [{"$ref": next}, {"type": "object"}]},
    }

    def chain(count: int) -> dict[str, Any]:
        places = [f"#/$defs/{place}" for place in range(count + 1)]
        defs = {str(place): forms[kind](places[place + 1]) for place in range(count)}
        return {"$ref": places[0], "$defs": {**defs, str(count): {"type": "object"}}}

    depth = {"$ref": 2, "object": 4, "items": 3, "allOf": 4}[kind]
    phi.stream(QUESTION, schema=chain(4000 // depth))
    with pytest.raises(GrammarError, match="references reach deeper than 4096 levels"):
        phi.stream(QUESTION, schema=chain(4200 // (depth - 1)))


def test_what_takes_long_to_compile_is_given_up(
    phi: phimlx.Phi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "COMPILE_SECONDS", 0.05)
    # Whether twenty expressions have a text in common takes llguidance seconds to see.
    parts = " & ".join(f"/.*[a-{chr(98 + place)}].{{{10 + place}}}/" for place in range(20))
    with pytest.raises(GrammarError, match=r"takes more than 0\.05 seconds to compile"):
        phi.stream(QUESTION, grammar=f"start: X\nX: {parts}")


def test_a_reply_is_continued_as_its_grammar_goes_on(phi: phimlx.Phi) -> None:
    def messages(said: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": said}]

    more = {"schema": CITY, "continue_final_message": True, "max_tokens": 60}
    reply = phi.generate(messages('{"city": "Par'), **more)
    assert reply.parsed["city"].startswith("Par")
    assert isinstance(reply.parsed["big"], bool)
    with pytest.raises(GrammarError, match="does not begin as its grammar has it"):
        phi.stream(messages("The city"), **more)


def test_a_picture_is_told_in_a_shape(phi: phimlx.Phi) -> None:
    sees = phimlx.load("nano-multimodal", dtype="float32")
    pixels = np.full((64, 64, 3), 200, np.uint8)
    for prompt_lookup in (True, False):
        given = {"images": [pixels], "max_tokens": 60, "prompt_lookup": prompt_lookup}
        reply = sees.generate("What does it show?", schema=CITY, **given)
        assert reply.parsed.keys() == {"city", "big"}


def test_replies_to_one_prompt_are_held_each_by_itself(phi: phimlx.Phi) -> None:
    options = GenerationOptions(schema=ROWS, max_tokens=200, seed=5, **WILD)
    requests = phi.requests(QUESTION, options, 3)
    phi.engine.run_all(requests)
    alone = [
        phi.generate(QUESTION, schema=ROWS, max_tokens=200, seed=5 + place, **WILD)
        for place in range(3)
    ]
    assert [each.reply.tokens for each in requests] == [each.tokens for each in alone]
    assert len({each.reply.text for each in requests}) > 1


def test_logits_that_are_no_numbers_are_told_as_ever() -> None:
    broken = phimlx.load("nano", dtype="float32")
    weight = broken.model.model.layers[1].mlp.down_proj.weight
    broken.model.model.layers[1].mlp.down_proj.weight = weight.at[3, 4].add(float("nan"))
    with pytest.raises(GenerationError, match="not finite"):
        broken.generate(QUESTION, schema=CITY)


def test_a_grammar_that_leads_nowhere_ends_its_own_row_alone(phi: phimlx.Phi) -> None:
    """After `{"a": ` nothing can come."""
    nowhere = {"properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"], "type": "object"}
    lost, other = request_of(phi, schema=nowhere), request_of(phi, schema=CITY)
    phi.engine.add(lost, other)
    for _ in range(300):
        phi.engine.step()
        if lost.finished and other.finished:
            break
    assert isinstance(lost.error, GrammarError)
    assert str(lost.error).startswith("The reply cannot be held to its grammar any further")
    assert other.error is None
    assert other.reply.parsed.keys() == {"city", "big"}
