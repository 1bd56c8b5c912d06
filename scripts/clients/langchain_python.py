"""LangChain's chat models for OpenAI, Anthropic and Ollama."""

from __future__ import annotations

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_ollama import ChatOllama
from langchain_openai import ChatOpenAI, OpenAI
from trying import NANO, PICTURE_URL, QUESTION, SEEING, URL, City, attempt, check, main, refuses


def openai_model(model=NANO, **more):
    return ChatOpenAI(
        model=model, base_url=f"{URL}/v1", api_key="none", max_tokens=100, max_retries=0, **more
    )


def anthropic_model(model=NANO):
    return ChatAnthropic(model=model, base_url=URL, api_key="none", max_tokens=100, max_retries=0)


def ollama_model(model=NANO):
    return ChatOllama(model=model, base_url=URL, num_predict=100)


def try_model(name, make, method):
    @attempt(f"{name}: invoke")
    def _():
        found = make().invoke(QUESTION)
        check(found.content)
        check(found.usage_metadata["output_tokens"])

    @attempt(f"{name}: streamed")
    def _():
        check("".join(chunk.text for chunk in make().stream(QUESTION)))

    @attempt(f"{name}: schema")
    def _():
        check(make().with_structured_output(City, method=method).invoke(QUESTION).city)

    @attempt(f"{name}: picture")
    def _():
        shown = [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": PICTURE_URL}},
        ]
        check(make(SEEING).invoke([HumanMessage(shown)]))

    @attempt(f"{name}: error")
    def _():
        refuses(lambda: make("absent").invoke(QUESTION), "absent")


def try_tools(name, make):
    @attempt(f"{name}: tools")
    def _():
        found = make().bind_tools([City], tool_choice="any").invoke(QUESTION)
        [call] = found.tool_calls
        check(call["name"] == "City")
        answer = ToolMessage("sunny", tool_call_id=call["id"])
        check(make().bind_tools([City]).invoke([HumanMessage(QUESTION), found, answer]))


try_model("openai", openai_model, "json_schema")
try_model("anthropic", anthropic_model, "json_schema")
try_model("ollama", ollama_model, "json_schema")
try_tools("openai", openai_model)
try_tools("anthropic", anthropic_model)


@attempt("openai: responses")
def _():
    check(openai_model(use_responses_api=True).invoke(QUESTION).content)


@attempt("openai: completions")
def _():
    model = OpenAI(model=NANO, base_url=f"{URL}/v1", api_key="none", max_tokens=20)
    check(model.invoke("Once upon a time") is not None)


main()
