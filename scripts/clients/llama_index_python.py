"""LlamaIndex with its OpenAILike and Ollama models."""

from __future__ import annotations

from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.ollama import Ollama
from llama_index.llms.openai_like import OpenAILike
from trying import NANO, PICTURE, QUESTION, SEEING, URL, City, attempt, check, main, refuses

ask = [ChatMessage(role="user", content=QUESTION)]


def weather(city: str) -> str:
    """Tell the weather."""
    return "sunny"


def openai_like(model=NANO):
    return OpenAILike(
        model=model,
        api_base=f"{URL}/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=1024,
        max_tokens=100,
        max_retries=0,
    )


def ollama(model=NANO):
    return Ollama(model=model, base_url=URL, additional_kwargs={"num_predict": 100})


def try_model(name, make):
    @attempt(f"{name}: chat")
    def _():
        check(make().chat(ask).message.content)

    @attempt(f"{name}: streamed")
    def _():
        check(list(make().stream_chat(ask))[-1].message.content)

    @attempt(f"{name}: complete")
    def _():
        check(make().complete(QUESTION).text)

    @attempt(f"{name}: picture")
    def _():
        blocks = [TextBlock(text="What is it?"), ImageBlock(path=PICTURE)]
        check(make(SEEING).chat([ChatMessage(role="user", blocks=blocks)]))

    @attempt(f"{name}: error")
    def _():
        refuses(lambda: make("absent").chat(ask), "absent")


try_model("openai", openai_like)
try_model("ollama", ollama)


@attempt("openai: tools")
def _():
    tool = FunctionTool.from_defaults(weather)
    found = openai_like().chat_with_tools([tool], QUESTION, tool_required=True)
    check(found.message.additional_kwargs["tool_calls"] or found.message.blocks)


@attempt("openai: schema")
def _():
    check(openai_like().as_structured_llm(City).chat(ask).raw.city)


@attempt("ollama: schema")
def _():
    check(ollama().as_structured_llm(City).chat(ask).raw.city)


main()
