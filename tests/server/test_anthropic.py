"""Anthropic's messages, with its own client: what comes back is what `Phi.generate` says."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import mlx.core as mx
import pytest

from phimlx.api import Phi, load
from phimlx.generation.engine import Engine
from phimlx.hub.resolve import NANO, NANO_MULTIMODAL
from phimlx.server import http
from phimlx.server.app import error_shape
from phimlx.server.errors import RequestError
from tests.server.conftest import Say
from tests.server.running import SECONDS, Running, running

PATH = "/v1/messages"
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Tell the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
FUNCTION = {
    "name": "get_weather",
    "description": "Tell the weather.",
    "parameters": WEATHER["input_schema"],
}
CALLS = (
    '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}, '
    '{"name": "get_weather", "arguments": {"city": "Rome"}}]<|/tool_call|>'
)


def ask(content: Any = "What is 2 plus 3?", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": "nano", "messages": messages, "max_tokens": 24, "temperature": 0, **more}


def events(text: str) -> list[tuple[str, Any]]:
    """The events of a stream, each with its name."""
    found = []
    for piece in text.removesuffix("\n\n").split("\n\n"):
        name, data = piece.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert all(name == data["type"] for name, data in found)
    return found


def text_of(message: dict[str, Any]) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=server.url, api_key="any", max_retries=0, timeout=SECONDS
    ) as client:
        yield client


@pytest.mark.parametrize("text", ["What is 2 plus 3?", "Tell me a story."])
def test_a_message_is_what_the_model_says_alone(
    client: anthropic.Anthropic, nano: Phi, text: str
) -> None:
    messages = [{"role": "user", "content": text}]
    expected = nano.generate(messages, max_tokens=24, temperature=0)
    found = client.messages.create(
        model="nano", max_tokens=24, messages=messages, extra_body={"temperature": 0}
    )
    assert [block.text for block in found.content] == [expected.text]
    assert (found.role, found.type, found.model) == ("assistant", "message", "nano")
    assert (found.stop_reason, found.stop_sequence) == ("end_turn", None)
    assert found.usage.input_tokens == expected.stats.prompt_tokens
    assert found.usage.output_tokens == len(expected.tokens)
    assert found.id.startswith("msg_")
    assert (found._request_id or "").startswith("req_")


def test_events_come_in_their_order_and_add_up(server: Running, nano: Phi) -> None:
    body = ask("Tell me a story.", stream=True)
    expected = nano.generate(body["messages"], max_tokens=24, temperature=0)
    answer = server.post(PATH, body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    names = [name for name, _ in found]
    deltas = [data["delta"] for name, data in found if name == "content_block_delta"]
    assert names == [
        "message_start", "ping", "content_block_start", *["content_block_delta"] * len(deltas),
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert "".join(delta["text"] for delta in deltas) == expected.text
    begun = found[0][1]["message"]
    assert (begun["content"], begun["stop_reason"]) == ([], None)
    assert begun["usage"]["input_tokens"] == expected.stats.prompt_tokens
    assert found[-2][1]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[-2][1]["usage"]["output_tokens"] == len(expected.tokens)


def test_the_client_puts_a_stream_together_as_the_whole(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {
        "model": "nano",
        "max_tokens": 24,
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "extra_body": {"temperature": 0},
    }
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert text_of(final.model_dump()) == text_of(whole.model_dump())
    assert (final.stop_reason, final.usage) == (whole.stop_reason, whole.usage)


CONVERSATIONS: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    (
        ask(system="Be short."),
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "What is 2 plus 3?"},
        ],
    ),
    (
        ask(
            [
                {"type": "text", "text": "What is"},
                {"type": "text", "text": "2 plus 3?", "cache_control": {"type": "ephemeral"}},
            ],
            system=[
                {"type": "text", "text": "Be short."},
                {
                    "type": "text",
                    "text": "Be kind.",
                    "cache_control": {"type": "ephemeral", "ttl": "1h"},
                },
            ],
        ),
        [
            {"role": "system", "content": "Be short.\n\nBe kind."},
            {"role": "user", "content": "What is\n\n2 plus 3?"},
        ],
    ),
    (
        {
            **ask(),
            "messages": [
                {"role": "user", "content": "What is"},
                {"role": "user", "content": "the weather?"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                        {"type": "redacted_thinking", "data": "x"},
                        {"type": "text", "text": "I look. "},
                        {
                            "type": "tool_use",
                            "id": "toolu_1",
                            "name": "get_weather",
                            "input": {"city": "Rome"},
                        },
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "toolu_1",
                            "content": [{"type": "text", "text": "sun"}],
                        },
                        {
                            "type": "document",
                            "title": "a.txt",
                            "source": {"type": "text", "media_type": "text/plain", "data": "A"},
                        },
                        {"type": "text", "text": "Go on."},
                    ],
                },
            ],
            "tools": [WEATHER],
        },
        [
            {"role": "user", "content": "What is\n\nthe weather?"},
            {
                "role": "assistant",
                "content": "I look. ",
                "tool_calls": [{"name": "get_weather", "arguments": {"city": "Rome"}}],
            },
            {"role": "tool", "content": "sun", "tool_call_id": "toolu_1"},
            {"role": "user", "content": "a.txt\n\nA\n\nGo on."},
        ],
    ),
    (
        {
            **ask(),
            "messages": [
                {
                    "role": "assistant",
                    "content": [
                        {"type": "tool_use", "id": "a", "name": "get_weather", "input": {}}
                    ],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "a", "content": "no city",
                                 "is_error": True}],
                },
            ],
        },
        [
            {"role": "assistant", "content": "",
             "tool_calls": [{"name": "get_weather", "arguments": {}}]},
            {"role": "tool", "content": "Error: no city", "tool_call_id": "a"},
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "messages"), CONVERSATIONS)
def test_a_conversation_is_read_as_its_messages(
    server: Running, nano: Phi, body: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    tools = [FUNCTION] if "tools" in body else None
    expected = nano.generate(messages, tools=tools, max_tokens=24, temperature=0)
    found = server.post(PATH, body).json()
    assert found["usage"]["input_tokens"] == len(nano.encode(messages, tools=tools))
    assert text_of(found) == expected.text
    counted = {key: body[key] for key in ("model", "messages", "system", "tools") if key in body}
    answer = server.post("/v1/messages/count_tokens?beta=true", counted).json()
    assert answer == {"input_tokens": found["usage"]["input_tokens"]}


def test_the_client_counts_tokens(client: anthropic.Anthropic, nano: Phi) -> None:
    messages = [{"role": "user", "content": "What is 2 plus 3?"}]
    tools: Any = [WEATHER]
    found = client.messages.count_tokens(model="nano", messages=messages, tools=tools)
    assert found.input_tokens == len(nano.encode(messages, tools=[FUNCTION]))


def test_a_reply_goes_on_from_the_assistants_words(server: Running, nano: Phi) -> None:
    messages = [
        {"role": "user", "content": "Tell me a story."},
        {"role": "assistant", "content": "Once"},
    ]
    expected = nano.generate(messages, max_tokens=12, temperature=0, continue_final_message=True)
    body = {**ask(), "messages": messages, "max_tokens": 12}
    assert text_of(server.post(PATH, body).json()) == expected.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("script", "more", "text", "reason", "sequence"),
    [
        ("One two three", {}, "One two three", "end_turn", None),
        ("One two three", {"stop_sequences": ["xyz", " th"]}, "One two", "stop_sequence", " th"),
        ("One two three", {"max_tokens": 1}, None, "max_tokens", None),
    ],
)
def test_why_a_message_ends(
    server: Running,
    say: Say,
    script: str,
    more: dict[str, Any],
    text: str | None,
    reason: str,
    sequence: str | None,
    stream: bool,
) -> None:
    say(script)
    answer = server.post(PATH, {**ask(), **more, "stream": stream})
    if stream:
        ended = events(answer.text)[-2][1]["delta"]
    else:
        ended = answer.json()
        assert text is None or text_of(ended) == text
    assert (ended["stop_reason"], ended["stop_sequence"]) == (reason, sequence)


def nano_of(folder: Path, context_length: int) -> Path:
    """Make a copy of nano that holds so many tokens, and is quicker on a CPU."""
    shutil.copytree(NANO, folder)
    weights: Any = mx.load(str(folder / "model.safetensors"))
    wider = {name: array.astype(mx.float32) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), wider, {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = context_length
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_reply_ends_with_the_context(tmp_path: Path, say: Say) -> None:
    say("on and on " * 40)
    with running(model=str(nano_of(tmp_path / "small", 150))) as server:
        for stream in (False, True):
            body = ask("a " * 100, model="small", max_tokens=32_000, stream=stream)
            answer = server.post(PATH, body)
            found = events(answer.text)[-2][1] if stream else answer.json()
            ended = found["delta"] if stream else found
            assert ended["stop_reason"] == "model_context_window_exceeded"
            assert found["usage"]["input_tokens"] + found["usage"]["output_tokens"] == 150


@pytest.mark.parametrize(
    ("choice", "cities"),
    [
        (None, ["Paris", "Rome"]),
        ({"type": "auto"}, ["Paris", "Rome"]),
        ({"type": "auto", "disable_parallel_tool_use": True}, ["Paris"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called(
    client: anthropic.Anthropic,
    say: Say,
    choice: Any,
    cities: list[str],
    stream: bool,
) -> None:
    say(f"I look. {CALLS}")
    asked: dict[str, Any] = {
        "model": "nano",
        "max_tokens": 400,
        "messages": [{"role": "user", "content": "Paris or Rome?"}],
        "tools": [WEATHER],
        **({} if choice is None else {"tool_choice": choice}),
    }
    if stream:
        with client.messages.stream(**asked) as streamed:
            found = streamed.get_final_message()
    else:
        found = client.messages.create(**asked)
    said, *calls = found.content
    assert (said.type, found.stop_reason) == ("text", "tool_use")
    assert said.text == "I look. "
    assert [(call.type, call.name, call.input) for call in calls] == [
        ("tool_use", "get_weather", {"city": city}) for city in cities
    ]
    ids = [call.id for call in calls]
    assert len(set(ids)) == len(ids)
    assert all(each.startswith("toolu_") for each in ids)


CHOICES: list[tuple[dict[str, Any], str]] = [
    ({"type": "auto"}, "auto"),
    ({"type": "none"}, "none"),
    ({"type": "any"}, "required"),
    ({"type": "tool", "name": "get_weather"}, "get_weather"),
    ({"type": "tool", "name": "get_time", "disable_parallel_tool_use": True}, "get_time"),
]


@pytest.mark.parametrize(("choice", "own"), CHOICES)
def test_calls_may_be_forced_or_forbidden(
    server: Running, nano: Phi, choice: dict[str, Any], own: str
) -> None:
    zone = {"enum": ["CET", "UTC"]}
    time_schema = {"type": "object", "properties": {"zone": zone}, "required": ["zone"]}
    city_schema = {**WEATHER["input_schema"], "required": ["city"]}
    city_schema["properties"] = {"city": {"enum": ["Paris", "Rome"]}}
    tools = [
        {"name": "get_weather", "input_schema": city_schema},
        {"name": "get_time", "input_schema": time_schema, "strict": True},
    ]
    functions = [{"name": tool["name"], "parameters": tool["input_schema"]} for tool in tools]
    body = ask(tools=tools, tool_choice=choice, max_tokens=64)
    expected = nano.generate(
        body["messages"], tools=functions, tool_choice=own, max_tokens=64, temperature=0
    )
    found = server.post(PATH, body).json()
    calls = [block for block in found["content"] if block["type"] == "tool_use"]
    assert [(call["name"], call["input"]) for call in calls] == [
        (call.name, call.arguments) for call in expected.tool_calls
    ]
    assert text_of(found) == expected.text
    if own not in ("auto", "none"):
        assert calls
    if own.startswith("get_"):
        assert {call["name"] for call in calls} == {own}


def test_a_reply_is_held_to_a_schema(server: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"enum": [5, 6]}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    body = ask(output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(text_of(server.post(PATH, body).json()))["sum"] in (5, 6)


THOUGHT = "<think>Two and three.</think>Five."


@pytest.mark.parametrize(
    ("thinking", "blocks"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, [("thinking", "Two and three."),
                                                     ("text", "Five.")]),
        ({"type": "adaptive"}, [("thinking", "Two and three."), ("text", "Five.")]),
        ({"type": "adaptive", "display": "omitted"}, [("thinking", ""), ("text", "Five.")]),
        ({"type": "disabled"}, [("text", "Five.")]),
        (None, [("text", "Five.")]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_there_where_it_is_asked_for(
    client: anthropic.Anthropic, say: Say, thinking: Any, blocks: list[Any], stream: bool
) -> None:
    say(THOUGHT)
    asked: dict[str, Any] = {
        "model": "nano",
        "max_tokens": 2000,
        "messages": [{"role": "user", "content": "What is 2 plus 3?"}],
        **({} if thinking is None else {"thinking": thinking}),
    }
    if stream:
        with client.messages.stream(**asked) as streamed:
            found = streamed.get_final_message()
    else:
        found = client.messages.create(**asked)
    assert [(block.type, getattr(block, block.type)) for block in found.content] == blocks
    assert all(block.signature for block in found.content if block.type == "thinking")


@pytest.fixture(scope="module")
def seeing() -> Phi:
    return load("nano-multimodal")


def picture(name: str) -> bytes:
    return (NANO_MULTIMODAL / "pictures" / name).read_bytes()


def image_block(data: bytes) -> dict[str, Any]:
    source = {
        "type": "base64",
        "media_type": "image/png",
        "data": base64.b64encode(data).decode(),
    }
    return {"type": "image", "source": source, "cache_control": {"type": "ephemeral"}}


@pytest.mark.slow
def test_pictures_are_seen(server: Running, seeing: Phi) -> None:
    data = picture("vision-00.png")
    question = "What is in the picture?"
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": data}, {"type": "text", "text": question}],
        }
    ]
    expected = seeing.generate(messages, max_tokens=24, temperature=0)
    body = ask([image_block(data), {"type": "text", "text": question}], model="nano-multimodal")
    found = server.post(PATH, body).json()
    assert (text_of(found), found["usage"]["input_tokens"]) == (
        expected.text,
        expected.stats.prompt_tokens,
    )
    # The same picture as a tool's result stands in the user's turn behind it.
    used = {"type": "tool_use", "id": "a", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [image_block(data)]}
    body["messages"] = [
        {"role": "assistant", "content": [used]},
        {"role": "user", "content": [result, {"type": "text", "text": question}]},
    ]
    called = [
        {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": {}}]},
        {"role": "tool", "content": ""},
        *messages,
    ]
    expected = seeing.generate(called, max_tokens=24, temperature=0)
    assert text_of(server.post(PATH, body).json()) == expected.text


def tool_turns(content: Any) -> list[dict[str, Any]]:
    used = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": content}
    return [
        {"role": "assistant", "content": [used]},
        {"role": "user", "content": [result]},
    ]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"nonsense": 1}, "nonsense: Extra inputs are not permitted"),
    ({"max_tokens": None}, "max_tokens: Field required"),
    ({"messages": None}, "messages: Field required"),
    ({"model": None}, "model: Field required"),
    ({"model": 5}, "model: "),
    ({"max_tokens": 0}, "max_tokens: "),
    ({"max_tokens": "many"}, "max_tokens: "),
    ({"temperature": 1.5}, "temperature: "),
    ({"temperature": "hot"}, "temperature: "),
    ({"top_p": 0}, "top_p: "),
    ({"top_k": -1}, "top_k: "),
    ({"stop_sequences": "x"}, "stop_sequences: "),
    ({"stop_sequences": [5]}, "stop_sequences.0: "),
    ({"stop_sequences": ["x" * 1025]}, "stop_sequences.0: "),
    ({"stop_sequences": [""]}, "stop is ''"),
    ({"stream": "yes"}, "stream: "),
    ({"messages": []}, "messages: "),
    ({"messages": [5]}, "messages.0: "),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role: "),
    ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0: "),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: "),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]},
     "messages.0.name: Extra inputs are not permitted"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages.0.content.0: "),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]},
     "messages.0.content.0.y: Extra inputs are not permitted"),
    ({"messages": [{"role": "user", "content": [
        {"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]}, "messages.0.content.0: "),
    ({"messages": [{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "b", "content": "x"}]}]}, "messages.0.content.0: "),
    ({"messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "file", "file_id": "f"}}]}]},
     "messages.0.content.0.source: "),
    ({"messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}}]}]},
     "messages[0].content[0] has an image_url"),
    ({"messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                     "data": "???"}}]}]}, "messages[0].content[0] has data"),
    ({"messages": [{"role": "user", "content": [image_block(picture("vision-00.png"))]}]},
     "nano reads text alone"),
    ({"messages": tool_turns([image_block(picture("vision-00.png"))])}, "nano reads text alone"),
    ({"messages": [{"role": "user", "content": [
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf",
                                        "data": "x"}}]}]}, "messages.0.content.0.source"),
    ({"system": 5}, "system: "),
    ({"system": [{"type": "image"}]}, "system.0.type: "),
    ({"tools": [{"name": "f"}]}, "tools.0.input_schema: Field required"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools.0.name: "),
    ({"tools": [WEATHER, WEATHER]}, "tools[1] is a second tool"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0: only tools"),
    ({"tool_choice": "auto"}, "tool_choice: "),
    ({"tool_choice": {"type": "any"}}, "tool_choice: "),
    ({"tool_choice": {"type": "tool", "name": "f"}, "tools": [WEATHER]}, "tool_choice: "),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens: Field required"),
    ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens: "),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.budget_tokens: "),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 5}}}},
     "A reply cannot be held to this"),
    ({"mcp_servers": [{"url": "https://x.example"}]}, "mcp_servers: "),
    ({"container": "c"}, "container: "),
    ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management: "),
    ({"metadata": {"user": 5}}, "metadata.user: Extra inputs are not permitted"),
    ({"messages": [{"role": "user", "content": "x" * 20_000}]}, "The prompt has "),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_request_is_refused_in_anthropics_shape(
    server: Running, change: dict[str, Any], message: str
) -> None:
    answer = server.post(PATH, ask() | change)
    assert answer.status_code == 400
    found = answer.json()
    assert set(found) == {"type", "error"}
    assert (found["type"], found["error"]["type"]) == ("error", "invalid_request_error")
    assert found["error"]["message"].startswith(message)
    assert server.post(PATH, ask(max_tokens=2)).status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "kind"),
    [
        (b"{", 400, "invalid_request_error"),
        (b"[]", 400, "invalid_request_error"),
        (b'{"model": "/etc", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}',
         404, "not_found_error"),
    ],
)  # fmt: skip
def test_other_errors_have_the_shape_too(
    server: Running, content: bytes, status: int, kind: str
) -> None:
    answer = server.client.post(PATH, content=content)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_kinds_of_errors(status: int, kind: str) -> None:
    assert error_shape("/v1/messages", RequestError(status, "No.")) == {
        "type": "error",
        "error": {"type": kind, "message": "No."},
    }


def test_the_client_raises_its_own_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="gone", max_tokens=1, messages=ask()["messages"])
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="nano", max_tokens=-1, messages=ask()["messages"])


def test_a_key_is_taken_as_anthropics_clients_send_it() -> None:
    with running(key="secret") as server:
        body = ask(max_tokens=2)
        assert server.post(PATH, body).json()["error"]["type"] == "authentication_error"
        for headers in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
            assert server.post(PATH, body, headers=headers).status_code == 200


def test_an_error_in_a_stream_is_an_event(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Engine) -> None:
        raise RuntimeError("inside")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", fail)
        *_, (name, data) = events(server.post(PATH, ask(stream=True)).text)
    assert (name, data["error"]["type"]) == ("error", "api_error")
    assert "inside" not in data["error"]["message"]
    assert server.post(PATH, ask(max_tokens=2)).status_code == 200


def test_a_client_that_waits_is_pinged(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    step, go_on = Engine.step, threading.Event()

    def wait(self: Engine) -> Any:
        assert go_on.wait(SECONDS)
        return step(self)

    monkeypatch.setattr(http, "PING_SECONDS", 0.01)
    monkeypatch.setattr(Engine, "step", wait)
    pings, last = 0, ""
    with server.client.stream("POST", PATH, json=ask(stream=True)) as answer:
        for line in answer.iter_lines():
            pings += line == "event: ping"
            if pings == 3:  # the first comes with the beginning
                go_on.set()
            last = line or last
    assert json.loads(last.removeprefix("data: ")) == {"type": "message_stop"}


def claude_code_body() -> dict[str, Any]:
    """A request as Claude Code 2.1 makes it, its texts and tools shortened."""
    cached: dict[str, Any] = {"cache_control": {"type": "ephemeral"}}
    tools = [
        {
            "name": f"Tool{number}",
            "description": f"Does work {number}.",
            "input_schema": {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "type": "object",
                "properties": {
                    "file_path": {"type": "string"},
                },
                "required": ["file_path"],
                "additionalProperties": False,
            },
            "eager_input_streaming": True,
        }
        for number in range(20)
    ]
    tools[-1] |= cached
    used = {"type": "tool_use", "id": "toolu_01", "name": "Tool3", "input": {"file_path": "/a"}}
    return {
        "model": "claude-local",
        "max_tokens": 32_000,
        "temperature": 1,
        "stream": True,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197"},
            {"type": "text", "text": "You are an agent for the command line.", **cached},
            {"type": "text", "text": "Environment: a folder.", **cached},
        ],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>Be kind.</system-reminder>"},
                    {"type": "text", "text": "What is in the file?", **cached},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I look.", "signature": "phimlx"},
                    {"type": "text", "text": "Let me look."},
                    used,
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_01",
                        "content": [{"type": "text", "text": "1\tapples"}],
                        "is_error": False,
                        **cached,
                    }
                ],
            },
            {"role": "system", "content": "Available agents: none."},
        ],
        "tools": tools,
        "tool_choice": {"type": "auto"},
        "metadata": {"user_id": "user_0_account__session_1"},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
    }


@pytest.mark.slow
def test_claude_code_works(tmp_path: Path, say: Say) -> None:
    say(
        "<think>Another file.</think>I read on."
        '<|tool_call|>[{"name": "Tool3", "arguments": {"file_path": "/b"}}]<|/tool_call|>'
    )
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,"
        "context-management-2025-06-27,mid-conversation-system-2026-04-07,effort-2025-11-24",
        "x-api-key": "any",
        "x-app": "cli",
        "user-agent": "claude-cli/2.1.197 (external, cli)",
    }
    with running(model=str(nano_of(tmp_path / "claude-local", 65_536))) as server:
        assert server.client.head("/").status_code == 200
        body = claude_code_body()
        counted = {key: body[key] for key in ("model", "messages", "system", "tools", "thinking")}
        tokens = server.post(f"{PATH}/count_tokens?beta=true", counted, headers=headers).json()
        answer = server.post(f"{PATH}?beta=true", body, headers=headers)
        assert answer.status_code == 200
        found = events(answer.text)
    assert found[0][1]["message"]["usage"]["input_tokens"] == tokens["input_tokens"] > 1024
    begun = [data["content_block"]["type"] for name, data in found if name == "content_block_start"]
    assert begun == ["thinking", "text", "tool_use"]
    deltas = {
        data["delta"]["type"]: data["delta"] for name, data in found if name.endswith("_delta")
        and name.startswith("content")
    }  # fmt: skip
    assert json.loads(deltas["input_json_delta"]["partial_json"]) == {"file_path": "/b"}
    assert found[-2][1]["delta"]["stop_reason"] == "tool_use"
