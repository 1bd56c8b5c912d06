"""A conversation in which a model's calls are run and answered until it has said all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from phimlx.errors import GenerationError, shortened
from phimlx.prompt.functions import ArgumentsError, Function, awaitable, value_text
from phimlx.prompt.messages import read_messages
from phimlx.prompt.tools import ToolCall, read_tools
from phimlx.tools import MAX_ROUNDS
from phimlx.tools.background import Background
from phimlx.tools.results import ToolResult, capped, error_text

if TYPE_CHECKING:
    from phimlx.generation.answerer import Answerer
    from phimlx.generation.reply import Chunk, Reply

NOT_HERE = ("raw", "continue_final_message")
"""Options of a reply that make no sense where there are several."""


@runtime_checkable
class Tool(Protocol):
    """What a model may call: a `Function`, or anything like one, such as a tool of `Servers`."""

    @property
    def definition(self) -> dict[str, Any]: ...

    def call(self, arguments: Mapping[str, Any]) -> Any: ...


@dataclass
class ChatResult:
    """The transcript of a chat.

    Attributes:
        messages: all of them, as `chat` takes them again: those it was given, then each reply
            with its calls, and the results of these.
        replies: one for each time that the model spoke.
        limited: whether the model would have called on, and was held to answer.
    """

    messages: list[dict[str, Any]]
    replies: list[Reply] = field(default_factory=list)
    limited: bool = False

    @property
    def reply(self) -> Reply:
        """The last reply."""
        return self.replies[-1]

    @property
    def message(self) -> dict[str, Any]:
        """The message of the last reply."""
        return self.messages[-1]

    @property
    def text(self) -> str:
        """The answer."""
        return self.reply.text

    @property
    def reasoning(self) -> str | None:
        """What the model thought before its last reply."""
        return self.reply.reasoning

    @property
    def parsed(self) -> Any:
        """The answer as its schema has it; see `Reply.parsed`."""
        return self.reply.parsed

    @property
    def finish_reason(self) -> str:
        """Why the last reply ended: "tool_calls" where it calls what the caller has to run."""
        return self.reply.finish_reason

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Calls that nobody has run."""
        return self.reply.tool_calls


class Chats:
    """Gives a model `chat`."""

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        max_rounds: int = MAX_ROUNDS,
        on_chunk: Callable[[Chunk], object] | None = None,
        on_message: Callable[[dict[str, Any]], object] | None = None,
        **options: Any,
    ) -> ChatResult:
        """Answer, and run the tools that the model calls on the way.

        A call is of a tool that is offered, its arguments as the schema has them. Calls of one
        reply are run in their order, asynchronous ones together. An error of a function is told
        to the model, which may try again; so are arguments that its annotations refuse.

        Args:
            messages: a text (one user message), or a list of messages.
            tools: Python functions, whose schemas come from annotations and docstrings, and
                definitions in OpenAI's form. Where one of the latter is called the chat ends, and
                the results of `tool_calls` are the caller's to add.
            max_rounds: replies that may call; the one that follows them answers.
            on_chunk: called with each piece of a reply as it comes.
            on_message: called with each message that is added.
            options: as of `stream`, for each reply. `tool_choice` is for the first alone, those
                that follow choose themselves. Without a `cache` there is one for this chat.

        Raises:
            PromptError: where a tool or a message cannot be read, or the model was not trained to
                call tools; and whatever `stream` raises.
        """
        phi = cast("Answerer", self)
        _check(max_rounds, options)
        given = [tool if isinstance(tool, Mapping) else _bound(tool) for tool in tools or ()]
        functions = read_tools([t.definition if isinstance(t, Tool) else t for t in given])
        runs = {
            function["name"]: tool
            for function, tool in zip(functions, given, strict=True)
            if isinstance(tool, Tool)
        }
        begun: Any = messages
        if isinstance(messages, str):
            begun = [{"role": "user", "content": messages}]
        read_messages(begun)
        result = ChatResult(list(begun))
        if functions:
            options["tools"] = functions
        if options.get("cache") is None and options.get("prompt_logprobs") is None:
            options["cache"] = phi.new_cache(options.get("kv_bits"))

        def add(message: dict[str, Any]) -> None:
            result.messages.append(message)
            if on_message is not None:
                on_message(message)

        with Background() as background:
            for left in range(max_rounds, -1, -1):
                if functions and not left:
                    options["tool_choice"] = "none"
                    result.limited = True
                reply = _reply(phi, result.messages, options, on_chunk)
                result.replies.append(reply)
                add(reply.as_message())
                calls = reply.tool_calls
                if not calls or not all(call.name in runs for call in calls):
                    break
                for call, text in zip(calls, _results(calls, runs, background), strict=True):
                    add({"role": "tool", "name": call.name, "content": text})
                options.pop("tool_choice", None)
        return result


def _check(max_rounds: Any, options: Mapping[str, Any]) -> None:
    if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 1:
        raise GenerationError(f"max_rounds is {shortened(max_rounds)}; it must be 1 or more.")
    for name in NOT_HERE:
        if options.get(name):
            raise GenerationError(f"A chat takes no {name}.", hint="Use generate, or stream.")


def _bound(tool: Any) -> Any:
    """A tool that can be called; what is neither that nor a function is for `read_tools` to say."""
    if isinstance(tool, Tool):
        return tool
    return Function(tool) if callable(tool) else tool


def _reply(
    phi: Answerer,
    messages: list[dict[str, Any]],
    options: Mapping[str, Any],
    on_chunk: Callable[[Chunk], object] | None,
) -> Reply:
    stream = phi.stream(messages, **options)
    try:
        for chunk in stream:
            if on_chunk is not None:
                on_chunk(chunk)
    finally:
        stream.close()
    return stream.reply


def _results(
    calls: Sequence[ToolCall], tools: Mapping[str, Tool], background: Background
) -> Iterator[str]:
    """Run the calls of one reply; give their results as texts, in their order."""
    begun = [_begin(tools[call.name], call.arguments, background) for call in calls]
    try:
        for result in begun:
            yield result.result() if isinstance(result, Future) else result
    finally:
        for result in begun:
            if isinstance(result, Future):
                result.cancel()


def _begin(tool: Tool, arguments: Mapping[str, Any], background: Background) -> str | Future[str]:
    try:
        value = tool.call(arguments)
        if isinstance(value, ToolResult):
            return value.text
        if awaitable(value):
            return background.start(_awaited, value)
        return capped(value_text(value))
    except ArgumentsError as error:
        return f"Error: these arguments do not fit: {error}"
    except Exception as error:
        return error_text(error)


async def _awaited(value: Any) -> str:
    try:
        return capped(value_text(await value))
    except Exception as error:
        return error_text(error)
