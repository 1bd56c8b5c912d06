"""OpenAI's responses, with its own client and as Codex asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from phimlx.api import Phi
from phimlx.server.kept import Kept
from tests.server.conftest import Say
from tests.server.running import SECONDS, Running
from tests.server.test_openai_chat import CALLS, CITIES, PARAMETERS, QUESTION, WEATHER

TEXT = "What is 2 plus 3?"
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Tell it.",
    "parameters": PARAMETERS,
    "strict": False,
}


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=SECONDS
    ) as client:
        yield client


def ask(client: openai.OpenAI, given: Any = TEXT, **more: Any) -> Any:
    settings = {"model": "nano", "max_output_tokens": 24, "temperature": 0, **more}
    return client.responses.create(input=given, **settings)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


ITEMS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "text": (TEXT, QUESTION),
    "easy message": ([user(TEXT)], QUESTION),
    "message of parts": (
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": TEXT}]}],
        QUESTION,
    ),
    "developer": (
        [{"type": "message", "role": "developer", "content": "Be brief."}, user(TEXT)],
        [{"role": "system", "content": "Be brief."}, *QUESTION],
    ),
    "output": (
        [
            user(TEXT),
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [
                    {"type": "output_text", "text": "5", "annotations": [], "logprobs": []}
                ],
            },
            user("Why?"),
        ],
        [*QUESTION, {"role": "assistant", "content": "5"}, user("Why?")],
    ),
    "calls": (
        [
            user(TEXT),
            {"role": "assistant", "content": "Let me see."},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"x": 1}'},
            {"type": "function_call", "call_id": "b", "name": "f", "arguments": "{}", "id": "fc_1"},
            {"type": "function_call_output", "call_id": "a", "output": "7"},
            {
                "type": "function_call_output",
                "call_id": "b",
                "output": [{"type": "input_text", "text": "8"}],
            },
        ],
        [
            *QUESTION,
            {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": [
                    {"name": "f", "arguments": {"x": 1}},
                    {"name": "f", "arguments": {}},
                ],
            },
            {"role": "tool", "content": "7"},
            {"role": "tool", "content": "8"},
        ],
    ),
}


@pytest.mark.parametrize("case", ITEMS)
def test_items_are_what_the_model_reads(client: openai.OpenAI, nano: Phi, case: str) -> None:
    items, messages = ITEMS[case]
    expected = nano.generate(messages, max_tokens=8, temperature=0)
    found = ask(client, items, max_output_tokens=8)
    assert found.output_text == expected.text
    assert found.usage.input_tokens == expected.stats.prompt_tokens
    assert found.status == ("incomplete" if expected.finish_reason == "length" else "completed")


def test_instructions_are_the_system(client: openai.OpenAI, nano: Phi) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    expected = nano.generate(messages, max_tokens=8, temperature=0)
    found = ask(client, instructions="Be brief.", max_output_tokens=8)
    assert (found.output_text, found.instructions) == (expected.text, "Be brief.")
    assert found.usage.input_tokens == expected.stats.prompt_tokens


def test_a_reply_that_was_cut_is_incomplete(client: openai.OpenAI) -> None:
    found = ask(client, "Tell me a story.", max_output_tokens=4)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.output[0].status == "incomplete"
    *_, last = ask(client, "Tell me a story.", max_output_tokens=4, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.output_text == found.output_text
    assert ask(client, max_output_tokens=5000).status == "completed"  # what the context holds


REASONED = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.reasoning_text.delta",
    "response.reasoning_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]
CALLED = [
    "response.created",
    "response.in_progress",
    *(
        [
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
        ]
        * 2
    ),
    "response.completed",
]


@pytest.mark.parametrize(
    ("text", "tools", "types"),
    [("<think>2 and 3.</think>5", [], REASONED), (CALLS, [TOOL], CALLED)],
)
def test_events_come_in_order(
    client: openai.OpenAI, say: Say, text: str, tools: list[Any], types: list[str]
) -> None:
    say(text)
    events = list(ask(client, tools=tools, max_output_tokens=99, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    found = [event.type for event in events]
    assert [
        each for number, each in enumerate(found) if found[number - 1 : number] != [each]
    ] == types
    say(text)
    whole = ask(client, tools=tools, max_output_tokens=99)
    last = events[-1].response
    assert last.output_text == whole.output_text
    assert [item.type for item in last.output] == [item.type for item in whole.output]
    for index, event in enumerate(events):
        if event.type.endswith("output_item.done"):
            assert event.item == last.output[event.output_index]
        if event.type.endswith("_text.done"):
            deltas = [
                each.delta
                for each in events[:index]
                if each.type.endswith("_text.delta") and each.item_id == event.item_id
            ]
            assert "".join(deltas) == event.text


def test_calls_are_items(client: openai.OpenAI, say: Say) -> None:
    say(CALLS)
    found = ask(client, tools=[TOOL], max_output_tokens=99)
    assert [json.loads(item.arguments) for item in found.output] == CITIES
    assert {(item.type, item.name, item.status) for item in found.output} == {
        ("function_call", "get_weather", "completed")
    }
    say(CALLS)
    assert (
        len(ask(client, tools=[TOOL], max_output_tokens=99, parallel_tool_calls=False).output) == 1
    )


def test_a_conversation_goes_on_from_a_response(client: openai.OpenAI, nano: Phi, say: Say) -> None:
    say(CALLS)
    first = ask(client, tools=[TOOL], max_output_tokens=99, instructions="Call.")
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
        for item in first.output
    ]
    found = ask(client, results, previous_response_id=first.id, tools=[TOOL], max_output_tokens=4)
    calls = [{"name": "get_weather", "arguments": arguments} for arguments in CITIES]
    messages = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "sunny"},
    ]
    # Instructions are those of one response alone.
    assert found.usage.input_tokens == len(nano.encode(messages, tools=[WEATHER]))
    assert found.previous_response_id == first.id
    referred = [user(TEXT), *({"type": "item_reference", "id": item.id} for item in first.output)]
    held = [user(TEXT), *first.output, *results]
    assert ask(client, held, tools=[TOOL], max_output_tokens=4).output_text == found.output_text
    again = ask(client, [*referred, *results], tools=[TOOL], max_output_tokens=4)
    assert again.output_text == found.output_text


def test_what_is_kept_can_be_read_and_deleted(client: openai.OpenAI) -> None:
    found = ask(client)
    assert client.responses.retrieve(found.id).output == found.output
    client.responses.delete(found.id)
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            call(found.id)
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, previous_response_id=found.id)
    assert error.value.code == "previous_response_not_found"
    unkept = ask(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)
    *_, last = ask(client, stream=True)
    assert client.responses.retrieve(last.response.id).status == "completed"


def test_the_client_parses_what_it_asked_for(client: openai.OpenAI) -> None:
    class Answer(BaseModel):
        sure: bool

    settings: dict[str, Any] = {"model": "nano", "input": TEXT, "temperature": 0}
    found = client.responses.parse(text_format=Answer, **settings)
    assert isinstance(found.output_parsed, Answer)
    with client.responses.stream(text_format=Answer, **settings) as stream:
        last = stream.get_final_response()
    assert last.output_parsed == found.output_parsed


def test_log_probabilities_are_told(client: openai.OpenAI, nano: Phi) -> None:
    expected = nano.generate(TEXT, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2)
    found = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    told = found.output[0].content[0].logprobs
    assert [each.logprob for each in told] == pytest.approx(
        [each.logprob for each in expected.logprobs[: expected.said]], abs=1e-4
    )
    assert all(len(each.top_logprobs) == 2 for each in told)
    events = ask(client, include=["message.output_text.logprobs"], top_logprobs=2, stream=True)
    streamed = [
        each for e in events if e.type == "response.output_text.delta" for each in e.logprobs
    ]
    assert [each.token for each in streamed] == [each.token for each in told]


def test_codex_is_answered(server: Running) -> None:
    body = {
        "model": "nano",
        "instructions": "You are a coding agent.",
        "input": [
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "Sandbox: read-only"}],
            },
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "hello"}],
            },
        ],
        "tools": [TOOL],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": None,
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a2",
        "text": {"verbosity": "medium"},
        "client_metadata": {"x-codex-installation-id": "1"},
        "max_output_tokens": 8,
    }
    headers = {"accept": "text/event-stream", "originator": "codex_cli_rs"}
    answer = server.post("/v1/responses", body, headers=headers)
    assert answer.status_code == 200
    names = [line for line in answer.text.split("\n") if line.startswith("event: ")]
    assert names[0] == "event: response.created"
    assert names[-1] in ("event: response.completed", "event: response.incomplete")


GROUP: Any = {"type": "namespace", "name": "places", "description": "Of places.", "tools": [TOOL]}
OFFLINE: Any = {"type": "web_search", "external_web_access": False}


def test_functions_of_a_namespace_are_called(server: Running) -> None:
    """As Codex groups its own, beside a search that must not search."""
    function = {"type": "function", "name": "clock"}
    body = {"model": "nano", "input": TEXT, "tools": [function, GROUP, OFFLINE]}
    forced = {"tool_choice": {"type": "function", "name": TOOL["name"]}}
    response = server.post("/v1/responses", body | forced).json()
    [call] = response["output"]
    assert (call["name"], call["namespace"]) == (TOOL["name"], "places")
    assert response["tools"][1]["name"] == "places"
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    said = [{"role": "user", "content": TEXT}, call, result]
    assert server.post("/v1/responses", body | {"input": said}).status_code == 200
    plain = server.post(
        "/v1/responses", body | {"tool_choice": {"type": "function", "name": "clock"}}
    )
    assert "namespace" not in plain.json()["output"][0]


@pytest.mark.parametrize(
    "tools",
    [
        [GROUP, TOOL],
        [GROUP, GROUP | {"name": "others"}],
        [{**GROUP, "tools": [OFFLINE]}],
        [{**GROUP, "tools": [GROUP]}],
        [{**OFFLINE, "external_web_access": True}],
        [{**OFFLINE, "external_web_access": 0}],
        [{**GROUP, "tools": [{**TOOL, "name": f"f{at}"} for at in range(128)]}, TOOL],
    ],
)
def test_groups_of_tools_that_cannot_be_had_are_refused(server: Running, tools: Any) -> None:
    answer = server.post("/v1/responses", {"model": "nano", "input": TEXT, "tools": tools})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("tools")


def test_what_is_kept_has_limits() -> None:
    kept: Kept[str] = Kept(3, 10)
    for key in "abc":
        kept.put(key, key.upper(), 2)
    assert kept.get("a") == "A"
    kept.put("d", "D", 2)
    assert [kept.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    kept.put("e", "E", 7)
    assert (list(kept), kept.nbytes) == (["E", "D"], 9)
    kept.put("f", "F", 11)
    assert (kept.get("f"), kept.delete("e"), kept.delete("e"), len(kept)) == (None, True, False, 1)
    kept.put("d", "DD", 1)
    assert (kept.get("d"), kept.nbytes) == ("DD", 1)
