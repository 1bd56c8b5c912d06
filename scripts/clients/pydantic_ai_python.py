"""Pydantic AI over OpenAI's two dialects."""

from __future__ import annotations

import asyncio

from pydantic_ai import Agent, BinaryContent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from trying import NANO, PICTURE, QUESTION, SEEING, URL, City, attempt, check, main, refuses


def chat(model):
    return OpenAIChatModel(model, provider=OpenAIProvider(f"{URL}/v1", api_key="none"))


def responses(model):
    return OpenAIResponsesModel(model, provider=OpenAIProvider(f"{URL}/v1", api_key="none"))


def agent(make, model=NANO, **more):
    return Agent(make(model), model_settings={"max_tokens": 100}, retries=0, **more)


def try_model(name, make):
    @attempt(f"{name}: run")
    def _():
        check(agent(make).run_sync(QUESTION).output)

    @attempt(f"{name}: streamed")
    def _():
        async def stream():
            async with agent(make).run_stream(QUESTION) as result:
                return [text async for text in result.stream_text()]

        check(asyncio.run(stream()))

    @attempt(f"{name}: tools")
    def _():
        check(agent(make, output_type=ToolOutput(City)).run_sync(QUESTION).output.city)

    @attempt(f"{name}: picture")
    def _():
        seen = BinaryContent(PICTURE.read_bytes(), media_type="image/png")
        check(agent(make, SEEING).run_sync(["What shape is red?", seen]).output is not None)

    @attempt(f"{name}: error")
    def _():
        refuses(lambda: agent(make, "absent").run_sync(QUESTION))


def try_schema(name, make):
    @attempt(f"{name}: schema")
    def _():
        found = agent(make, output_type=NativeOutput(City)).run_sync(QUESTION)
        check(found.output.city)


for each in (chat, responses):
    try_model(each.__name__, each)
    try_schema(each.__name__, each)
main()
