"""OpenAI's chat completions with OpenAI's own client."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from phimlx.api import Phi, load
from phimlx.hub.resolve import NANO_MULTIMODAL
from tests.server.conftest import Say
from tests.server.running import SECONDS, Running

QUESTION: list[Any] = [{"role": "user", "content": "What is 2 plus 3?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Tell it.", "parameters": PARAMETERS},
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
CALLS = (
    '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}, '
    '{"name": "get_weather", "arguments": {"city": "Rome"}}]<|/tool_call|>'
)
CITIES = [{"city": "Paris"}, {"city": "Rome"}]


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=SECONDS
    ) as client:
        yield client


def ask(client: openai.OpenAI, messages: Any = QUESTION, **more: Any) -> Any:
    given = {"model": "nano", "max_tokens": 24, "temperature": 0, **more}
    return client.chat.completions.create(messages=messages, **given)


def joined(stream: Any) -> dict[str, Any]:
    """What a client makes of a stream with one choice."""
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "logprobs": []}
    for chunk in stream:
        for choice in chunk.choices:
            delta = choice.delta
            found["content"] += delta.content or ""
            found["reasoning"] += (delta.model_extra or {}).get("reasoning_content") or ""
            for call in delta.tool_calls or ():
                if call.index == len(found["calls"]):
                    found["calls"].append({"id": call.id, "name": call.function.name, "text": ""})
                found["calls"][call.index]["text"] += call.function.arguments
            found["logprobs"] += choice.logprobs.content if choice.logprobs else []
            found["finish_reason"] = choice.finish_reason
    return found


MESSAGES: dict[str, list[dict[str, Any]]] = {
    "system": [{"role": "system", "content": "Be brief."}, *QUESTION],
    "developer": [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        *QUESTION,
    ],
    "parts": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is "},
                {"type": "text", "text": "2 plus 3?"},
            ],
        }
    ],
    "name": [{"role": "user", "name": "ann", "content": "Hello"}],
    "history": [
        *QUESTION,
        {"role": "assistant", "content": "5", "refusal": None, "annotations": []},
        {"role": "user", "content": "And 4 plus 4?"},
    ],
    "refusal": [
        *QUESTION,
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "user", "content": "Why?"},
    ],
    "reasoned": [
        *QUESTION,
        {"role": "assistant", "content": "5", "reasoning_content": "2 and 3."},
        {"role": "user", "content": "Why?"},
    ],
    "nulls": [{"role": "user", "content": "Hello", "name": None}],
}
# The same in the form that `Phi.generate` takes.
PLAIN: dict[str, list[dict[str, Any]]] = {
    "system": [{"role": "system", "content": "Be brief."}, *QUESTION],
    "developer": [{"role": "system", "content": "Be brief."}, *QUESTION],
    "parts": QUESTION,
    "name": [{"role": "user", "content": "Hello"}],
    "history": [
        *QUESTION,
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "And 4 plus 4?"},
    ],
    "refusal": [
        *QUESTION,
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
    ],
    "reasoned": [
        *QUESTION,
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "Why?"},
    ],
    "nulls": [{"role": "user", "content": "Hello"}],
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages_of_every_role_are_what_the_model_reads(
    client: openai.OpenAI, nano: Phi, case: str
) -> None:
    expected = nano.generate(PLAIN[case], max_tokens=8, temperature=0)
    found = ask(client, MESSAGES[case], max_tokens=8)
    assert found.choices[0].message.content == expected.text
    assert found.usage.prompt_tokens == expected.stats.prompt_tokens


SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_completion_tokens": 3}, {"max_tokens": 3}),
    ({"stop": "e"}, {"stop": "e"}),
    ({"stop": ["zz", "", "t"]}, {"stop": ["zz", "t"]}),
    ({"temperature": 1.5, "seed": 3}, {"temperature": 1.5, "seed": 3}),
    ({"temperature": 1.5, "seed": -1}, {"temperature": 1.5, "seed": 2**64 - 1}),
    ({"temperature": 2, "seed": 3, "top_p": 0.4}, {"temperature": 2, "seed": 3, "top_p": 0.4}),
    (
        {"presence_penalty": 2, "frequency_penalty": 1.5},
        {"presence_penalty": 2.0, "frequency_penalty": 1.5},
    ),
    ({"logit_bias": {"5": 100, "7": -3}}, {"logit_bias": {5: 100, 7: -3}}),
    (
        {"extra_body": {"top_k": 3}, "temperature": 2, "seed": 5},
        {"top_k": 3, "temperature": 2, "seed": 5},
    ),
    (
        {"extra_body": {"top_k": -1, "min_p": 0.2}, "temperature": 2, "seed": 5},
        {"top_k": 0, "min_p": 0.2, "temperature": 2, "seed": 5},
    ),
    ({"extra_body": {"repetition_penalty": 5}}, {"repetition_penalty": 5}),
    ({"extra_body": {"guided_choice": ["a.b", "no (x)"]}}, {"regex": r"a\.b|no \(x\)"}),
    ({"extra_body": {"guided_regex": "[a-c]{5}"}}, {"regex": "[a-c]{5}"}),
    ({"extra_body": {"guided_grammar": 'start: "x" "y"'}}, {"grammar": 'start: "x" "y"'}),
    ({"extra_body": {"guided_json": {"enum": ["a"]}}}, {"schema": {"enum": ["a"]}}),
    ({"extra_body": {"guided_json": '{"enum": ["a"]}'}}, {"schema": {"enum": ["a"]}}),
    ({"extra_body": {"structured_outputs": {"regex": "[a-c]{5}"}}}, {"regex": "[a-c]{5}"}),
    ({"response_format": {"type": "text"}}, {}),
    (
        {
            "user": "u",
            "metadata": {"a": "b"},
            "service_tier": "auto",
            "store": False,
            "prompt_cache_key": "k",
            "safety_identifier": "s",
            "modalities": ["text"],
            "verbosity": "medium",
        },
        {},
    ),
    (
        {
            "extra_body": {
                "ignore_eos": False,
                "length_penalty": 1.0,
                "cache_salt": "x",
                "stop": None,
                "tools": None,
                "max_tokens": None,
                "max_completion_tokens": 5,
            }
        },
        {"max_tokens": 5},
    ),
]


@pytest.mark.parametrize(("sent", "options"), SETTINGS)
def test_settings_are_those_of_the_python_api(
    client: openai.OpenAI, nano: Phi, sent: dict[str, Any], options: dict[str, Any]
) -> None:
    given = {"max_tokens": 8, "temperature": 0, **options}
    expected = nano.generate(QUESTION, **given)
    sent = {"max_tokens": 8, **sent}
    found = ask(client, **sent)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == expected.finish_reason
    assert joined(ask(client, **sent, stream=True))["content"] == expected.text


def test_settings_do_what_they_say(client: openai.OpenAI) -> None:
    plain = ask(client).choices[0].message.content
    assert plain == "5"
    assert ask(client, logit_bias={"5": 100}).choices[0].message.content != plain
    assert ask(client, extra_body={"guided_choice": ["no", "na"]}).choices[0].message.content in (
        "no",
        "na",
    )


def test_a_begun_answer_is_continued(client: openai.OpenAI, nano: Phi) -> None:
    messages = [
        {"role": "user", "content": "Tell me a story."},
        {"role": "assistant", "content": "Once"},
    ]
    expected = nano.generate(messages, max_tokens=12, temperature=0, continue_final_message=True)
    turn = nano.generate(messages, max_tokens=12, temperature=0)
    for more in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
        found = ask(client, messages, max_tokens=12, extra_body=more)
        assert found.choices[0].message.content == expected.text
        stream = ask(client, messages, max_tokens=12, extra_body=more, stream=True)
        assert joined(stream)["content"] == expected.text
    found = ask(client, messages, max_tokens=12, extra_body={"continue_final_message": False})
    assert found.usage.prompt_tokens == turn.stats.prompt_tokens


def test_log_probabilities_are_those_of_the_python_api(client: openai.OpenAI, nano: Phi) -> None:
    messages = [{"role": "user", "content": "Tell me a story."}]
    expected = nano.generate(messages, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3)
    assert nano.tokenizer is not None
    given: dict[str, Any] = {"max_tokens": 8, "logprobs": True, "top_logprobs": 3}
    told = ask(client, messages, **given).choices[0].logprobs.content
    streamed = joined(ask(client, messages, **given, stream=True))
    assert streamed["logprobs"] == told
    for one, scored in zip(told, expected.logprobs[: expected.said], strict=True):
        assert bytes(one.bytes) == nano.tokenizer.token_bytes(scored.token)
        assert one.logprob == pytest.approx(scored.logprob, abs=1e-4)
        tops = [bytes(each.bytes) for each in one.top_logprobs]
        assert tops == [nano.tokenizer.token_bytes(token) for token, _ in scored.top]
    assert b"".join(bytes(one.bytes) for one in told).decode() == expected.text


def test_log_probabilities_of_a_stop_string_are_not_told(client: openai.OpenAI, nano: Phi) -> None:
    messages = [{"role": "user", "content": "Tell me a story."}]
    text = nano.generate(messages, max_tokens=24, temperature=0).text
    given: dict[str, Any] = {"logprobs": True, "stop": text[6:10]}
    told = ask(client, messages, **given).choices[0].logprobs.content
    assert joined(ask(client, messages, **given, stream=True))["logprobs"] == told
    assert text[:6].startswith(b"".join(bytes(one.bytes) for one in told[:-1]).decode())


def test_calls_come_as_clients_read_them(client: openai.OpenAI, say: Say) -> None:
    say(CALLS)
    found = ask(client, tools=[WEATHER, CLOCK], max_tokens=99)
    message = found.choices[0].message
    assert (message.content, found.choices[0].finish_reason) == (None, "tool_calls")
    assert [json.loads(call.function.arguments) for call in message.tool_calls] == CITIES
    assert len({call.id for call in message.tool_calls}) == 2
    say(CALLS)
    streamed = joined(ask(client, tools=[WEATHER, CLOCK], max_tokens=99, stream=True))
    assert [json.loads(call["text"]) for call in streamed["calls"]] == CITIES
    assert all(call["id"].startswith("call_") for call in streamed["calls"])
    assert (streamed["content"], streamed["finish_reason"]) == ("", "tool_calls")


def test_one_call_at_a_time(client: openai.OpenAI, say: Say) -> None:
    say(CALLS)
    found = ask(client, tools=[WEATHER], parallel_tool_calls=False, max_tokens=99)
    assert len(found.choices[0].message.tool_calls) == 1
    say(CALLS)
    assert (
        len(
            joined(
                ask(client, tools=[WEATHER], parallel_tool_calls=False, max_tokens=99, stream=True)
            )["calls"]
        )
        == 1
    )


CHOICES: list[tuple[Any, str | None]] = [
    ("required", None),
    ({"type": "function", "function": {"name": "clock"}}, "clock"),
    (
        {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [WEATHER | {"function": {"name": "get_weather"}}],
            },
        },
        "get_weather",
    ),
]


@pytest.mark.parametrize(("choice", "name"), CHOICES)
def test_a_call_is_forced(client: openai.OpenAI, choice: Any, name: str | None) -> None:
    found = ask(client, tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=40)
    [call] = found.choices[0].message.tool_calls
    assert call.function.name in ([name] if name else ["get_weather", "clock"])
    assert json.loads(call.function.arguments) in (*CITIES, {})
    assert found.choices[0].finish_reason == "tool_calls"


def test_no_call_where_none_is_wanted(client: openai.OpenAI, nano: Phi) -> None:
    given: dict[str, Any] = {"max_tokens": 24, "tools": [WEATHER], "tool_choice": "none"}
    expected = nano.generate(QUESTION, temperature=0, **given)
    found = ask(client, **given)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].message.tool_calls is None
    assert found.usage.prompt_tokens == expected.stats.prompt_tokens


def test_history_with_calls_is_what_the_model_reads(client: openai.OpenAI, nano: Phi) -> None:
    arguments = {"city": "Rome", "days": [1, 2]}
    call = {
        "id": "made-up-7",
        "type": "function",
        "function": {"name": "get_weather", "arguments": json.dumps(arguments)},
    }
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "made-up-7", "content": "sunny"}
    plain = [
        *QUESTION,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "get_weather", "arguments": arguments}],
        },
        {"role": "tool", "content": "sunny"},
    ]
    expected = nano.encode(plain, tools=[WEATHER])
    found = ask(client, [*QUESTION, said, result], tools=[WEATHER], max_tokens=4)
    assert found.usage.prompt_tokens == len(expected)
    parts = {**result, "content": [{"type": "text", "text": "sunny"}]}
    again = ask(client, [*QUESTION, said, parts], tools=[WEATHER], max_tokens=4)
    assert again.choices[0].message.content == found.choices[0].message.content


def test_a_reply_is_held_to_a_schema(client: openai.OpenAI) -> None:
    class Answer(BaseModel):
        word: str
        sure: bool

    schema = {**Answer.model_json_schema(), "additionalProperties": False}
    schema["properties"]["word"] = {"enum": ["red", "green"]}
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }
    found = ask(client, response_format=form, max_tokens=60)
    Answer.model_validate_json(found.choices[0].message.content)
    streamed = joined(ask(client, response_format=form, max_tokens=60, stream=True))
    assert streamed["content"] == found.choices[0].message.content


def test_the_client_parses_what_it_asked_for(client: openai.OpenAI) -> None:
    class Answer(BaseModel):
        sure: bool

    found = client.chat.completions.parse(
        model="nano", messages=QUESTION, response_format=Answer, max_tokens=60, temperature=0
    )
    assert isinstance(found.choices[0].message.parsed, Answer)
    with client.chat.completions.stream(
        model="nano", messages=QUESTION, response_format=Answer, max_tokens=60, temperature=0
    ) as stream:
        last = stream.get_final_completion()
    assert last.choices[0].message.parsed == found.choices[0].message.parsed


def test_a_reply_is_any_object(client: openai.OpenAI) -> None:
    found = ask(client, response_format={"type": "json_object"}, max_tokens=12)
    assert found.choices[0].message.content.startswith("{")


def test_reasoning_has_a_place_of_its_own(client: openai.OpenAI, say: Say) -> None:
    say("<think>2 and 3.</think>5")
    found = ask(client)
    message = found.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == (
        "5",
        "2 and 3.",
        "2 and 3.",
    )
    spent = found.usage.completion_tokens_details.reasoning_tokens
    assert 0 < spent < found.usage.completion_tokens
    say("<think>2 and 3.</think>5")
    streamed = joined(ask(client, stream=True))
    assert (streamed["content"], streamed["reasoning"]) == ("5", "2 and 3.")
    say("<think>2 and 3.</think>5")
    assert "reasoning" not in (
        ask(client, extra_body={"include_reasoning": False}).choices[0].message.model_extra or {}
    )


def test_usage_comes_last_and_is_null_before(client: openai.OpenAI) -> None:
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True}, n=2)
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage.completion_tokens) == ([], 4)
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}


@pytest.mark.slow
def test_each_choice_of_a_stream_ends_when_it_has_ended(client: openai.OpenAI) -> None:
    story = [{"role": "user", "content": "Tell me a story."}]
    settings = {"n": 4, "seed": 7, "temperature": 1.3, "max_tokens": 40}
    told = [chunk.choices[0] for chunk in ask(client, story, stream=True, **settings)]
    for index in range(4):
        own = [each for each in told if each.index == index]
        assert [each for each in own if each.finish_reason] == own[-1:]
    ends = [place for place, each in enumerate(told) if each.finish_reason]
    assert ends[0] < len(told) - 4  # others go on


def test_pictures_and_sounds_are_what_the_model_gets(client: openai.OpenAI) -> None:
    photo = next((NANO_MULTIMODAL / "pictures").iterdir()).read_bytes()
    sound = next((NANO_MULTIMODAL / "clips").iterdir()).read_bytes()

    def data(kind: str, raw: bytes) -> str:
        return f"data:{kind};base64,{base64.b64encode(raw).decode()}"

    phi = load(NANO_MULTIMODAL)
    plain = [
        {"type": "image", "image": photo},
        {"type": "text", "text": "and"},
        {"type": "audio", "audio": sound},
    ]
    encoded = base64.b64encode(sound).decode()
    sent = [
        {"type": "image_url", "image_url": {"url": data("image/png", photo), "detail": "auto"}},
        {"type": "text", "text": "and"},
        {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
    ]
    expected = phi.generate([{"role": "user", "content": plain}], max_tokens=3, temperature=0)
    messages = [{"role": "user", "content": sent}]
    found = ask(client, messages, model="nano-multimodal", max_tokens=3)
    assert found.choices[0].message.content == expected.text
    assert found.usage.prompt_tokens == expected.stats.prompt_tokens


def test_pictures_elsewhere_are_not_fetched(client: openai.OpenAI) -> None:
    content = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
    with pytest.raises(openai.BadRequestError):
        ask(client, [{"role": "user", "content": content}], model="nano-multimodal")


def test_a_conversation_that_is_too_long_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, max_tokens=5000)
    assert error.value.code == "context_length_exceeded"


def test_what_is_not_served_says_why(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.embeddings.create(model="nano", input="x")
    assert error.value.code == "unsupported_endpoint"
    assert "embeddings" in error.value.message
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve("file-1")
    assert "nano" in [model.id for model in client.models.list()]
    assert client.models.retrieve("nano").id == "nano"


def test_a_message_is_taken_back_as_the_client_holds_it(
    client: openai.OpenAI, nano: Phi, say: Say
) -> None:
    say(CALLS)
    message = ask(client, tools=[WEATHER], max_tokens=99).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls
    ]
    for held in (message, message.model_dump()):
        found = ask(client, [*QUESTION, held, *results], tools=[WEATHER], max_tokens=2)
        assert found.usage.prompt_tokens > len(nano.encode(QUESTION, tools=[WEATHER]))


@pytest.mark.parametrize(
    "given",
    [
        {"reasoning_effort": "none"},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        {"extra_body": {"thinking": {"type": "disabled"}}},
        {"extra_body": {"reasoning": {"enabled": False, "exclude": True}}},
    ],
)
def test_a_model_that_does_not_reason_may_be_told_not_to(
    client: openai.OpenAI, given: dict[str, Any]
) -> None:
    assert ask(client, **given).choices[0].message.content == "5"
