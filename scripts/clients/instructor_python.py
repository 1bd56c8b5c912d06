"""Instructor, by schema and by calls."""

from __future__ import annotations

import anthropic
import instructor
import openai
from trying import NANO, QUESTION, URL, City, attempt, check, main, refuses

ask = [{"role": "user", "content": QUESTION}]


def try_mode(name, client, mode):
    @attempt(name)
    def _():
        found = client(mode).chat.completions.create(
            model=NANO, messages=ask, response_model=City, max_tokens=100, max_retries=0
        )
        check(found.city)


def over_openai(mode):
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    return instructor.from_openai(client, mode=mode)


def over_anthropic(mode):
    client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
    return instructor.from_anthropic(client, mode=mode)


try_mode("openai: tools", over_openai, instructor.Mode.TOOLS)
try_mode("openai: schema", over_openai, instructor.Mode.JSON_SCHEMA)
try_mode("anthropic: tools", over_anthropic, instructor.Mode.ANTHROPIC_TOOLS)


@attempt("openai: schema, streamed")
def _():
    client = over_openai(instructor.Mode.JSON_SCHEMA)
    parts = client.chat.completions.create_partial(
        model=NANO, messages=ask, response_model=City, max_tokens=100
    )
    check(list(parts)[-1].city)


@attempt("error")
def _():
    refuses(
        lambda: over_openai(instructor.Mode.TOOLS).chat.completions.create(
            model="absent", messages=ask, response_model=City, max_retries=0
        )
    )


main()
