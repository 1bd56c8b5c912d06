"""LiteLLM, in each of the three dialects."""

from __future__ import annotations

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # asks nothing of the network

import litellm
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

litellm.suppress_debug_info = True
ask = [{"role": "user", "content": QUESTION}]
tool = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
DIALECTS = {"openai": f"{URL}/v1", "anthropic": URL, "ollama_chat": URL}


def complete(dialect="openai", model=NANO, **more):
    return litellm.completion(
        **{
            "model": f"{dialect}/{model}",
            "api_base": DIALECTS[dialect],
            "api_key": "none",
            "messages": ask,
            "max_tokens": 40,
            "num_retries": 0,
            **more,
        }
    )


def try_dialect(dialect):
    @attempt(f"{dialect}: chat")
    def _():
        check(complete(dialect).choices[0].message.content)

    @attempt(f"{dialect}: streamed")
    def _():
        check("".join(e.choices[0].delta.content or "" for e in complete(dialect, stream=True)))

    @attempt(f"{dialect}: schema")
    def _():
        found = complete(dialect, response_format=City, max_tokens=100)
        check("city" in json.loads(found.choices[0].message.content))

    @attempt(f"{dialect}: picture")
    def _():
        shown = [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": PICTURE_URL}},
        ]
        check(complete(dialect, SEEING, messages=[{"role": "user", "content": shown}]).choices)

    @attempt(f"{dialect}: error")
    def _():
        refuses(lambda: complete(dialect, "absent"), "absent")


for each in DIALECTS:
    try_dialect(each)


@attempt("openai: tools")
def _():
    found = complete(tools=[tool], tool_choice="required").choices[0].message.tool_calls
    check(found[0].function.name == "weather")


@attempt("anthropic: tools")
def _():
    found = complete("anthropic", tools=[tool], tool_choice="required")
    check(found.choices[0].message.tool_calls[0].function.name == "weather")


@attempt("openai: tools, streamed")
def _():
    chunks = list(complete(tools=[tool], tool_choice="required", stream=True))
    check(litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls)


@attempt("openai: responses")
def _():
    given = {"model": f"openai/{NANO}", "api_base": DIALECTS["openai"], "api_key": "none"}
    check(litellm.responses(input=QUESTION, max_output_tokens=40, **given).output)


@attempt("openai: transcription")
def _():
    with CLIP.open("rb") as file:
        found = litellm.transcription(
            model=f"openai/{SEEING}", file=file, api_base=DIALECTS["openai"], api_key="none"
        )
    check(found.text is not None)


main()
