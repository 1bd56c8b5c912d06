"""Anthropic's client for Python."""

from __future__ import annotations

import anthropic
from trying import (
    CITY,
    NANO,
    PICTURE_DATA,
    QUESTION,
    SEEING,
    URL,
    City,
    attempt,
    check,
    main,
    refuses,
)

client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0, timeout=120)
ask = [{"role": "user", "content": QUESTION}]
tool = {"name": "weather", "description": "Tell it.", "input_schema": CITY}
picture = {"type": "base64", "media_type": "image/png", "data": PICTURE_DATA}


def create(**more):
    return client.messages.create(**{"model": NANO, "messages": ask, "max_tokens": 40, **more})


@attempt("models")
def _():
    check({NANO, SEEING} <= {model.id for model in client.models.list()})


@attempt("messages")
def _():
    check(create(system=[{"type": "text", "text": "Be brief."}]).content[0].text)


@attempt("messages, streamed")
def _():
    with client.messages.stream(model=NANO, messages=ask, max_tokens=40) as stream:
        check("".join(stream.text_stream))
        check(stream.get_final_message().usage.output_tokens)


@attempt("tools")
def _():
    found = create(tools=[tool], tool_choice={"type": "any"})
    [call] = [block for block in found.content if block.type == "tool_use"]
    check(found.stop_reason == "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    said = {"role": "assistant", "content": found.content}
    check(create(tools=[tool], messages=[*ask, said, {"role": "user", "content": [result]}]))


@attempt("tools, streamed")
def _():
    with client.messages.stream(
        model=NANO,
        messages=ask,
        max_tokens=40,
        tools=[tool],
        tool_choice={"type": "tool", "name": "weather"},
    ) as stream:
        check(stream.get_final_message().content[-1].input["city"])


@attempt("schema")
def _():
    found = client.messages.parse(model=NANO, messages=ask, max_tokens=100, output_format=City)
    check(found.parsed_output.city)


@attempt("picture")
def _():
    content = [{"type": "image", "source": picture}, {"type": "text", "text": "What is it?"}]
    check(create(model=SEEING, messages=[{"role": "user", "content": content}]).content)


@attempt("count of tokens")
def _():
    check(client.messages.count_tokens(model=NANO, messages=ask, tools=[tool]).input_tokens)


@attempt("error")
def _():
    refuses(lambda: create(model="absent"))
    refuses(lambda: create(temperature=9), "temperature")


main()
