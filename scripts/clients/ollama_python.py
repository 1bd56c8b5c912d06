"""Ollama's client for Python."""

from __future__ import annotations

import json

import ollama
from trying import CITY, NANO, PICTURE, QUESTION, SEEING, URL, attempt, check, main, refuses

client = ollama.Client(URL, timeout=120)
ask = [{"role": "user", "content": QUESTION}]
limits = {"num_predict": 40, "temperature": 0}


def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: where
    """
    return "sunny"


def chat(**more):
    return client.chat(**{"model": NANO, "messages": ask, "options": limits, **more})


@attempt("models")
def _():
    check({NANO, SEEING} <= {model.model.split(":")[0] for model in client.list().models})
    check("vision" in client.show(SEEING).capabilities)
    check(client.ps())


@attempt("chat")
def _():
    check(chat().message.content)


@attempt("chat, streamed")
def _():
    parts = list(chat(stream=True))
    check("".join(part.message.content or "" for part in parts))
    check(parts[-1].done and parts[-1].eval_count)


@attempt("generate")
def _():
    check(client.generate(NANO, QUESTION, options=limits).response)
    check(list(client.generate(NANO, QUESTION, options=limits, stream=True))[-1].done)


@attempt("tools")
def _():
    check(chat(tools=[weather]).message)
    call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    answer = {"role": "tool", "tool_name": "weather", "content": "sunny"}
    check(chat(tools=[weather], messages=[*ask, said, answer]).message)


@attempt("schema")
def _():
    check(json.loads(chat(format=CITY).message.content)["city"] in ("Paris", "Rome"))


@attempt("picture")
def _():
    shown = [{"role": "user", "content": "What is it?", "images": [str(PICTURE)]}]
    check(chat(model=SEEING, messages=shown).message)


@attempt("error")
def _():
    refuses(lambda: chat(model="absent"), "absent")
    refuses(lambda: client.embed(NANO, "a"), "embedd")


main()
