"""Bad requests of OpenAI's dialect: each is refused in its shape, the next good one answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from phimlx.generation.engine import Engine
from phimlx.server.http import MAX_TEXT, Body
from phimlx.server.openai.chat import ChatBody
from phimlx.server.openai.completions import CompletionBody
from phimlx.server.openai.response_body import ResponseBody
from tests.everything import EVERYTHING
from tests.server.running import Running

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER = {"role": "user", "content": "2+2"}
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": "nano", "messages": [USER], "max_tokens": 1},
    COMPLETIONS: {"model": "nano", "prompt": "2+2", "max_tokens": 1},
    RESPONSES: {"model": "nano", "input": "2+2", "max_output_tokens": 1},
}
BODIES: dict[str, type[Body]] = {
    CHAT: ChatBody,
    COMPLETIONS: CompletionBody,
    RESPONSES: ResponseBody,
}
TOOL = {"type": "function", "function": {"name": "f"}}
FLAT = {"type": "function", "name": "f"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        value = {"type": "object", "properties": {"a": value}}
    return value


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}


def said(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


CHATS: list[tuple[dict[str, Any], str | None]] = [
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"model": "nowhere"}, None),
    ({"model": "../../etc"}, None),
    ({"model": "\ud800"}, None),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "2+2"}, "messages"),
    ({"messages": [USER] * 4097}, "messages"),
    ({"messages": ["2+2"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "2+2"}]}, "messages[0]"),
    ({"messages": [{"role": "boss", "content": "2+2"}]}, "messages[0]"),
    ({"messages": [{"role": "function", "name": "f", "content": "2+2"}]}, "messages[0]"),
    ({"messages": [{**USER, "colour": "red"}]}, "messages[0].colour"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": said()}, "messages[0].content"),
    ({"messages": said({"type": "image"})}, "messages[0].content[0]"),
    ({"messages": said({"type": "text"})}, "messages[0].content[0].text"),
    ({"messages": said({"type": "text", "text": 5})}, "messages[0].content[0].text"),
    (
        {"messages": said({"type": "image_url", "image_url": {}})},
        "messages[0].content[0].image_url.url",
    ),
    ({"messages": said({"type": "image_url", "image_url": "file:///etc/passwd"})}, None),
    ({"messages": said({"type": "image_url", "image_url": "data:image/png;base64,AAAA"})}, None),
    (
        {"messages": said({"type": "image_url", "image_url": {"url": "a", "detail": "low"}})},
        "detail",
    ),
    (
        {"messages": said({"type": "input_audio", "input_audio": {"data": "AA"}})},
        "messages[0].content[0].input_audio.format",
    ),
    (
        {"messages": said({"type": "input_audio", "input_audio": {"data": "AA", "format": "exe"}})},
        "messages[0].content[0].input_audio.format",
    ),
    (
        {"messages": said({"type": "input_audio", "input_audio": {"data": "!", "format": "wav"}})},
        None,
    ),
    (
        {
            "messages": said(
                *[{"type": "image_url", "image_url": "data:image/png;base64,AAAA"}] * 65
            )
        },
        None,
    ),
    ({"messages": [USER, {"role": "assistant", "function_call": {"name": "f"}}]}, "function_call"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "a"}]}]},
        "messages[1].tool_calls[0].function",
    ),
    (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}],
                },
            ]
        },
        "messages[1].tool_calls[0].function.arguments",
    ),
    (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}],
                },
                USER,
            ]
        },
        None,
    ),
    (
        {"messages": [USER, {"role": "tool", "content": "5", "tool_call_id": "a"}]},
        "messages[1].tool_call_id",
    ),
    ({"messages": [USER, {"role": "tool", "content": "5"}]}, "messages[1].tool_call_id"),
    ({"colour": "red"}, "colour"),
    ({"stop": 5}, "stop"),
    ({"stop": [1, 2]}, "stop"),
    ({"stop": [None]}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop": "a" * 1025}, "stop"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 10**40}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_tokens": 10**9}, None),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a"),
    ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
    ({"logit_bias": {"999999": 1}}, None),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"logprobs": 3}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, None),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"all": True}}, "stream_options.all"),
    ({"tools": {}}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
        "tools[0].function.parameters",
    ),
    ({"tools": [TOOL] * 2}, None),
    ({"tools": [TOOL] * 129}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": deep(40)}}]}, None),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "f", "tools": [TOOL]}, "tool_choice"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
        "tool_choice",
    ),
    ({"tool_choice": {"type": "custom", "custom": {"name": "g"}}, "tools": [TOOL]}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": schema(5)}, "response_format.json_schema.schema"),
    ({"response_format": schema({"type": "nonsense"})}, None),
    ({"response_format": schema(deep(40))}, None),
    ({"response_format": schema({"enum": ["a" * 300_000]})}, None),
    ({"response_format": schema({"$ref": "https://example.com/schema"})}, None),
    ({"response_format": schema({"enum": ["\ud800"]})}, None),
    ({"guided_regex": "("}, None),
    ({"guided_regex": "a", "guided_grammar": 'start: "a"'}, None),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_grammar": "nonsense"}, None),
    ({"guided_choice": []}, "guided_choice"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"store": True}, "store"),
    ({"verbosity": "high"}, "verbosity"),
    ({"ignore_eos": True}, "ignore_eos"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": True}, "best_of"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"adapters": "/etc"}, "adapters"),
    ({"chat_template_kwargs": {"system": "x"}}, "chat_template_kwargs.system"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"continue_final_message": True}, None),
    ({"reasoning_effort": "high"}, None),
    ({"reasoning": {"effort": "low"}}, None),
    ({"chat_template_kwargs": {"enable_thinking": True}}, None),
    ({"thinking": {"type": "enabled"}}, None),
    ({"service_tier": "priority"}, "service_tier"),
    ({"metadata": {"a": 5}}, "metadata.a"),
]
TEXTS: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ""}, None),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, None),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [5, "a"]}, "prompt"),
    ({"prompt": [-1]}, None),
    ({"prompt": [10**9]}, None),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [5] * 2000}, None),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 3}, "best_of"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"echo": 1}, "echo"),
    ({"messages": [USER]}, "messages"),
]
RESPONSE_CASES: list[tuple[dict[str, Any], str | None]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [5]}, "input[0]"),
    ({"input": [{"type": "message", "content": "a"}]}, "input[0].role"),
    ({"input": [{"type": "web_search_call", "id": "a"}]}, "input[0]"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "a"}]}]},
        "input[0].content[0]",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "a"}]}]},
        "file_id",
    ),
    (
        {
            "input": [
                {"role": "user", "content": [{"type": "input_image", "image_url": "/etc/passwd"}]}
            ]
        },
        None,
    ),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input[0].arguments"),
    (
        {"input": [{"type": "function_call_output", "call_id": "a", "output": "5"}]},
        "input[0].call_id",
    ),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [{"type": "mcp", "server_label": "a"}]}, "tools[0]"),
    ({"tools": [TOOL]}, "tools[0].name"),
    ({"tools": [FLAT], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
    ({"tools": [FLAT], "tool_choice": {"type": "file_search"}}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format"),
    ({"text": {"verbosity": "low"}}, "verbosity"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"include": ["file_search_call.results"]}, "include[0]"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"messages": [USER]}, "messages"),
    ({"store": "yes"}, "store"),
    ({"instructions": ["a"]}, "instructions"),
]
CASES = [
    (path, change, param)
    for path, cases in ((CHAT, CHATS), (COMPLETIONS, TEXTS), (RESPONSES, RESPONSE_CASES))
    for change, param in cases
]


def check_refusal(answer: Any, statuses: tuple[int, ...] = (400, 404)) -> dict[str, Any]:
    assert answer.status_code in statuses, answer.text[:500]
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert 0 < len(error["message"]) < 1000
    return error


def send(server: Running, path: str, body: Any) -> Any:
    """Send a body as JSON; halves of surrogates are escapes in it."""
    headers = {"content-type": "application/json"}
    return server.client.post(path, content=json.dumps(body), headers=headers)


@pytest.mark.parametrize(("path", "change", "param"), CASES)
def test_a_bad_request_is_refused(
    server: Running, path: str, change: dict[str, Any], param: str | None
) -> None:
    error = check_refusal(send(server, path, GOOD[path] | change))
    assert error["param"] == param
    if param is not None:
        assert param.split("[")[0].split(".")[-1] in error["message"]


@pytest.mark.parametrize("path", GOOD)
def test_the_next_good_request_is_answered(server: Running, path: str) -> None:
    assert send(server, path, GOOD[path]).status_code == 200


RAW = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a text": b'"a"',
    "null": b"null",
    "not UTF-8": b'{"model": "\xff"}',
    "NaN": b'{"temperature": NaN}',
    "infinity": b'{"temperature": 1e999}',
    "a long number": b'{"seed": ' + b"9" * 5000 + b"}",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 101 + b"1" + b"}" * 101,
    "two bodies": b"{}{}",
}


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("kind", RAW)
def test_what_is_no_body_is_refused(server: Running, path: str, kind: str) -> None:
    check_refusal(server.client.post(path, content=RAW[kind]))
    assert server.client.get(path).status_code == 405


def test_only_media_make_a_body_long(server: Running) -> None:
    long = "a" * (MAX_TEXT + 1)
    check_refusal(send(server, CHAT, GOOD[CHAT] | {"user": long}), (413,))
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{long}"}}
    error = check_refusal(send(server, CHAT, GOOD[CHAT] | {"messages": said(part)}))
    assert "reads text alone" in error["message"] or "base64" in error["message"]


VALUES: tuple[Any, ...] = (
    "a",
    "",
    "\ud800",
    "a" * 5000,
    5,
    -1,
    0,
    1.5,
    10**30,
    True,
    [],
    {},
    [None],
    [[]],
    [{}],
    ["a"],
    [5],
    {"a": 1},
    {"type": "function"},
    {"type": []},
    {"role": {}},
    [{"type": "text", "text": []}],
    [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}],
)
STEP = 4  # one value of so many is tried for a field, not the same ones for its neighbour
FIELDS = [
    (path, name) for path, body in BODIES.items() for name in (*body.model_fields, *body.refused)
]


@pytest.fixture(scope="module")
def steady(server: Running) -> Iterator[Running]:
    """The server, which must not have failed in the tests that use it."""
    before = server.app.service.worker.restarts
    yield server
    assert server.app.service.worker.restarts == before
    assert server.app.service.running == 0


@pytest.mark.slow
@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_no_value_of_a_field_is_an_error_of_the_server(
    steady: Running, path: str, name: str
) -> None:
    first = FIELDS.index((path, name)) % STEP
    for value in VALUES if EVERYTHING else VALUES[first::STEP]:
        answer = send(steady, path, GOOD[path] | {name: value})
        if answer.status_code != 200:
            error = check_refusal(answer)
            assert error["param"] is None or error["param"].split(".")[0].split("[")[0] in (
                name,
                *BODIES[path].model_fields,
                "detail",
            )
    assert send(steady, path, GOOD[path]).status_code == 200


ENDS = {
    CHAT: ["data: [DONE]"],
    COMPLETIONS: ["data: [DONE]"],
    RESPONSES: [],
}


@pytest.mark.parametrize("path", GOOD)
def test_an_error_in_a_stream_is_an_event_and_its_end(
    server: Running, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def fail(self: Engine) -> None:
        raise RuntimeError("inside")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", fail)
        text = send(server, path, GOOD[path] | {"stream": True}).text
        whole = send(server, path, GOOD[path])
    lines = [line for line in text.split("\n") if line.startswith("data: ")]
    last = lines[-1 - len(ENDS[path])]
    assert lines[len(lines) - len(ENDS[path]) :] == ENDS[path]
    told = json.loads(last.removeprefix("data: "))
    if path == RESPONSES:
        assert (told["type"], told["response"]["status"]) == ("response.failed", "failed")
        told = told["response"]
    assert told["error"]["code"] == "internal_error"
    assert (whole.status_code, whole.json()["error"]["type"]) == (500, "server_error")
    assert "inside" not in text + whole.text
    assert send(server, path, GOOD[path]).status_code == 200
