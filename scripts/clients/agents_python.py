"""OpenAI's agents library, over responses and over chat completions."""

from __future__ import annotations

import asyncio
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from trying import NANO, QUESTION, URL, City, attempt, check, main, refuses

set_tracing_disabled(True)


@function_tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """Tell the weather."""
    return "sunny"


def agent(kind, model=NANO, **more):
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    settings = more.pop("model_settings", ModelSettings(max_tokens=100))
    return Agent(
        name="a",
        instructions="Be brief.",
        model=kind(model, client),
        model_settings=settings,
        **more,
    )


def try_model(name, kind):
    @attempt(f"{name}: run")
    def _():
        check(Runner.run_sync(agent(kind), QUESTION).final_output)

    @attempt(f"{name}: streamed")
    def _():
        async def stream():
            result = Runner.run_streamed(agent(kind), QUESTION)
            events = [event.type async for event in result.stream_events()]
            return events, result.final_output

        events, output = asyncio.run(stream())
        check("raw_response_event" in events and output)

    @attempt(f"{name}: tools")
    def _():
        forced = ModelSettings(tool_choice="required", max_tokens=100)
        made = agent(kind, tools=[weather], model_settings=forced)
        items = Runner.run_sync(made, QUESTION).new_items
        check("tool_call_output_item" in [item.type for item in items])

    @attempt(f"{name}: schema")
    def _():
        found = Runner.run_sync(agent(kind, output_type=City), QUESTION)
        check(found.final_output.city)

    @attempt(f"{name}: error")
    def _():
        refuses(lambda: Runner.run_sync(agent(kind, "absent"), QUESTION))


try_model("responses", OpenAIResponsesModel)
try_model("chat", OpenAIChatCompletionsModel)
main()
