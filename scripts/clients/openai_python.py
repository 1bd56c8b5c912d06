"""OpenAI's client for Python."""

from __future__ import annotations

import openai
from trying import (
    CITY,
    CLIP,
    NANO,
    PICTURE_URL,
    QUESTION,
    SEEING,
    URL,
    City,
    attempt,
    check,
    main,
    refuses,
)

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=120)
ask = [{"role": "user", "content": QUESTION}]
tool = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
seen = [
    {"type": "text", "text": "What is in the picture?"},
    {"type": "image_url", "image_url": {"url": PICTURE_URL}},
]


def create(**more):
    return client.chat.completions.create(
        **{"model": NANO, "messages": ask, "max_tokens": 40, **more}
    )


@attempt("models")
def _():
    check({NANO, SEEING} <= {model.id for model in client.models.list()})
    check(client.models.retrieve(NANO).id == NANO)


@attempt("chat")
def _():
    found = create()
    check(found.choices[0].message.content)
    check(found.usage.total_tokens)


@attempt("chat, streamed")
def _():
    with client.chat.completions.stream(
        model=NANO, messages=ask, max_tokens=40, stream_options={"include_usage": True}
    ) as stream:
        check([event for event in stream if event.type == "content.delta"])
        final = stream.get_final_completion()
    check(final.choices[0].message.content)
    check(final.usage.completion_tokens)


@attempt("4 choices, streamed")
def _():
    chunks = [chunk.choices[0] for chunk in create(n=4, stream=True, seed=1)]
    check({each.index for each in chunks if each.finish_reason} == {0, 1, 2, 3})


@attempt("log-probabilities")
def _():
    found = create(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    check(len(found[0].top_logprobs) == 3)


@attempt("tools")
def _():
    [call] = create(tools=[tool], tool_choice="required").choices[0].message.tool_calls
    check(call.function.name == "weather")
    answer = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    said = {"role": "assistant", "tool_calls": [call.model_dump()]}
    check(create(tools=[tool], messages=[*ask, said, answer]).choices)


@attempt("tools, streamed")
def _():
    named = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(
        model=NANO, messages=ask, tools=[tool], tool_choice=named
    ) as stream:
        [call] = stream.get_final_completion().choices[0].message.tool_calls
    check(call.function.arguments)


@attempt("schema")
def _():
    found = client.chat.completions.parse(model=NANO, messages=ask, response_format=City)
    check(found.choices[0].message.parsed.city)


@attempt("picture")
def _():
    check(create(model=SEEING, messages=[{"role": "user", "content": seen}]).choices)


@attempt("completions")
def _():
    found = client.completions.create(
        model=NANO, prompt=["One", "Two"], max_tokens=0, echo=True, logprobs=1
    )
    check(len(found.choices) == 2)
    check(
        [
            each.choices[0].text
            for each in client.completions.create(
                model=NANO, prompt="Once upon", max_tokens=8, stream=True
            )
        ]
    )


@attempt("responses")
def _():
    first = client.responses.create(model=NANO, input=QUESTION, max_output_tokens=40)
    check(first.output_text)
    check(
        client.responses.create(
            model=NANO, input="And?", previous_response_id=first.id, max_output_tokens=40
        ).output
    )
    check(client.responses.retrieve(first.id).id == first.id)
    parsed = client.responses.parse(model=NANO, input=QUESTION, text_format=City)
    check(parsed.output_parsed.city)


@attempt("responses, streamed")
def _():
    with client.responses.stream(model=NANO, input=QUESTION, max_output_tokens=40) as stream:
        check([event for event in stream if event.type == "response.output_text.delta"])
        check(stream.get_final_response().output_text)


@attempt("responses with tools")
def _():
    flat = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
    found = client.responses.create(
        model=NANO, input=QUESTION, tools=[flat], tool_choice="required"
    )
    check([item for item in found.output if item.type == "function_call"])


@attempt("transcription")
def _():
    for form in ("json", "text", "srt", "vtt", "verbose_json"):
        with CLIP.open("rb") as file:
            check(client.audio.transcriptions.create(model=SEEING, file=file, response_format=form))
    with CLIP.open("rb") as file:
        events = list(client.audio.transcriptions.create(model=SEEING, file=file, stream=True))
    check(events[-1].type == "transcript.text.done")


@attempt("translation")
def _():
    with CLIP.open("rb") as file:
        check(client.audio.translations.create(model=SEEING, file=file).text is not None)


@attempt("error")
def _():
    refuses(lambda: create(model="absent"))
    refuses(lambda: create(stop=5), "stop")
    refuses(lambda: client.embeddings.create(model=NANO, input="a"), "embeddings")


main()
