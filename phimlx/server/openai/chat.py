"""OpenAI's chat completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phimlx.generation.logprobs import MAX_TOP
from phimlx.generation.reply import Chunk, Reply
from phimlx.prompt.tools import ToolCall
from phimlx.server.errors import bad_request, explain
from phimlx.server.http import MAX_MESSAGES, Body, Json, Refusal, Streamed, event, read_body
from phimlx.server.logprobs import token_objects
from phimlx.server.openai.bodies import (
    MAX_TOOLS,
    OTHERS_FIELDS,
    Effort,
    FormatSchema,
    Function,
    PlainFormat,
    SamplingBody,
    StreamOptions,
    ToolChoice,
    chosen,
    select_tools,
    wants_reasoning,
)
from phimlx.server.openai.messages import AssistantMessage, Message, turns
from phimlx.server.openai.shapes import (
    ThoughtCounter,
    call_object,
    error_object,
    usage,
)
from phimlx.server.service import Answer, Ask, Service


class FunctionTool(Body):
    refused: ClassVar = {"custom": Refusal("only tools of the type function are known")}

    type: Literal["function"]
    function: Function
    cache_control: dict[str, Any] | None = None


class FunctionName(Body):
    name: str


class NamedTool(ToolChoice):
    type: Literal["function"]
    function: FunctionName

    def read(self) -> tuple[str, list[str] | None]:
        return self.function.name, None


class Allowed(Body):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedTools(ToolChoice):
    type: Literal["allowed_tools"]
    allowed_tools: Allowed

    def read(self) -> tuple[str, list[str] | None]:
        return self.allowed_tools.mode, [each.function.name for each in self.allowed_tools.tools]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: FormatSchema

    def options(self) -> dict[str, Any]:
        """Choose what the answer is held to, of the options of `GenerationOptions`."""
        return self.json_schema.options()


class TemplateKwargs(Body):
    enable_thinking: bool | None = None
    thinking: bool | None = None


class Thinking(Body):
    type: Literal["enabled", "disabled", "auto"]


class Reasoning(Body):
    """What OpenRouter's clients say of reasoning."""

    refused: ClassVar = {"max_tokens": Refusal("reasoning has no limit of its own")}

    effort: Effort | None = None
    enabled: bool | None = None
    exclude: bool = False
    summary: Literal["auto"] | None = None


class ChatStreamOptions(StreamOptions):
    """What a stream tells besides the reply.

    Attributes:
        include_stats: phimlx's own: with each piece what the reply has taken so far, and with the
            last its warnings, both as `phimlx generate --json` prints them.
    """

    include_stats: bool = False


class ChatBody(SamplingBody):
    """The body of a chat completion: OpenAI's fields, and those of others that clients send."""

    refused: ClassVar = {
        **OTHERS_FIELDS,
        "audio": Refusal("replies are text"),
        "echo": Refusal("a reply is what follows the messages", (False,)),
        "function_call": Refusal("this is the older form; send tool_choice"),
        "functions": Refusal("this is the older form; send tools", ([],)),
        "grammar": Refusal("use guided_grammar, in the form of Lark"),
        "modalities": Refusal("replies are text", (["text"],)),
        "moderation": Refusal("nothing is moderated here"),
        "prompt_logprobs": Refusal("use /v1/completions with echo and logprobs"),
        "store": Refusal("chat completions are not stored here", (False,)),
        "verbosity": Refusal("say in a message how long the answer is to be", ("medium",)),
        "web_search_options": Refusal("nothing is searched here; offer a tool that does"),
    }

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream_options: ChatStreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP)
    tools: list[FunctionTool] = Field(default=[], max_length=MAX_TOOLS)
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedTool | AllowedTools, Field(discriminator="type")]
    ) = "auto"
    parallel_tool_calls: bool = True
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] = (
        PlainFormat(type="text")
    )
    reasoning_effort: Effort | None = None
    reasoning: Reasoning = Reasoning()
    thinking: Thinking | None = None
    include_reasoning: bool = True
    chat_template_kwargs: TemplateKwargs = TemplateKwargs()
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    prediction: dict[str, Any] | None = None

    @property
    def tells_stats(self) -> bool:
        """Whether a stream tells all the time what it takes."""
        return self.stream_options is not None and self.stream_options.include_stats

    @property
    def shows_reasoning(self) -> bool:
        return self.include_reasoning and not self.reasoning.exclude

    def calls(self, calls: list[ToolCall]) -> list[ToolCall]:
        """The calls that are told of."""
        return calls if self.parallel_tool_calls else calls[:1]

    def ask(self) -> Ask:
        """Say it in no dialect. Raises RequestError for what cannot be honoured."""
        options = {
            **self.sampling(),
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
            "continue_final_message": self._continues(),
            **self.held_to(),
            **self.response_format.options(),
            **select_tools([tool.function for tool in self.tools], self.tool_choice),
        }
        reasons = wants_reasoning(self._effort())
        return Ask(self.model, turns(self.messages), chosen(options), self.n, reasons=reasons)

    def _continues(self) -> bool:
        """Whether the last message is the beginning of the reply."""
        last = self.messages[-1]
        begun = isinstance(last, AssistantMessage) and not last.tool_calls
        continues = begun if self.continue_final_message is None else self.continue_final_message
        if self.add_generation_prompt is False and not continues:
            raise bad_request(
                "add_generation_prompt: there is no reply without it.", "add_generation_prompt"
            )
        return continues

    def _effort(self) -> str | None:
        """What is said of reasoning, in whichever field."""
        switches = (
            self.chat_template_kwargs.enable_thinking,
            self.chat_template_kwargs.thinking,
            self.reasoning.enabled,
            {"enabled": True, "disabled": False}.get(self.thinking.type if self.thinking else ""),
        )
        switched = [{True: "medium", False: "none"}[each] for each in switches if each is not None]
        return self.reasoning_effort or self.reasoning.effort or next(iter(switched), None)


@dataclass(frozen=True)
class Completion:
    """What the chunks of one response have in common."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": "phimlx", "choices": choices, **more}


async def chat_completions(request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    service: Service = request.app.service
    body = await read_body(request, ChatBody)
    async with AsyncExitStack() as stack:
        answer = await stack.enter_async_context(service.answer(body.ask()))
        completion, thought = Completion(answer.model), _counters(body)
        if body.stream:
            return Streamed(_stream(completion, body, answer, thought), stack.pop_all())
        async for index, chunk in answer.chunks():
            thought[index].add(chunk)
        choices = [_choice(body, answer, index) for index in range(body.n)]
        spent = usage(answer.requests, sum(each.tokens for each in thought))
        return Json(completion.object("chat.completion", choices, usage=spent))


def _counters(body: ChatBody) -> list[ThoughtCounter]:
    return [ThoughtCounter() for _ in range(body.n)]


class Deltas:
    """The chunks of one choice."""

    def __init__(self, completion: Completion, body: ChatBody, answer: Answer, index: int) -> None:
        self._completion = completion
        self._body = body
        self._phi = answer.phi
        self._stats = answer.requests[index].reply.stats
        self._index = index
        self._calls = 0

    def begin(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def add(self, chunk: Chunk) -> list[bytes]:
        """Take a chunk of the reply; make those of the stream."""
        logprobs = None
        if self._body.logprobs and chunk.logprobs:
            logprobs = _logprobs(token_objects(self._phi, chunk.logprobs))
        made = []
        if chunk.kind == "reasoning" and self._body.shows_reasoning and chunk.text:
            made.append(_reasoning(chunk.text))
        elif chunk.kind == "text" and chunk.text:
            made.append({"content": chunk.text})
        elif logprobs is not None:
            made.append({"content": ""})
        begun = self._calls
        self._calls += len(chunk.tool_calls)
        told = chunk.tool_calls if self._body.parallel_tool_calls or begun == 0 else ()
        for number, call in enumerate(self._body.calls(list(told)), begun):
            made += _call_deltas(call, number)
        return [
            self._chunk(delta, logprobs if place == 0 else None) for place, delta in enumerate(made)
        ]

    def end(self, reply: Reply) -> bytes:
        return self._chunk({}, None, reply)

    def _chunk(
        self,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reply: Reply | None = None,
    ) -> bytes:
        choice = {
            "index": self._index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reply and reply.finish_reason,
        }
        more: dict[str, Any] = {"usage": None} if self._body.tells_usage else {}
        if self._body.tells_stats:
            more |= {"stats": self._stats.as_object()}
            more |= {} if reply is None else {"warnings": reply.warnings}
        return event(self._completion.object("chat.completion.chunk", [choice], **more))


async def _stream(
    completion: Completion, body: ChatBody, answer: Answer, thought: list[ThoughtCounter]
) -> AsyncIterator[bytes]:
    choices = [Deltas(completion, body, answer, index) for index in range(body.n)]
    try:
        for deltas in choices:
            yield deltas.begin()
        async for index, chunk in answer.steps():
            if chunk is None:
                yield choices[index].end(answer.requests[index].reply)
                continue
            thought[index].add(chunk)
            for made in choices[index].add(chunk):
                yield made
        if body.tells_usage:
            spent = usage(answer.requests, sum(each.tokens for each in thought))
            yield event(completion.object("chat.completion.chunk", [], usage=spent))
    except Exception as error:
        yield event(error_object(explain(error)))
    yield event("[DONE]")


def _choice(body: ChatBody, answer: Answer, index: int) -> dict[str, Any]:
    reply = answer.requests[index].reply
    message: dict[str, Any] = {
        "role": "assistant",
        "content": reply.text or (None if reply.tool_calls else ""),
        "refusal": None,
    }
    if reply.reasoning and body.shows_reasoning:
        message |= _reasoning(reply.reasoning)
    if reply.tool_calls:
        message["tool_calls"] = [call_object(call) for call in body.calls(reply.tool_calls)]
    logprobs = None
    if body.logprobs:
        logprobs = _logprobs(token_objects(answer.phi, reply.logprobs[: reply.said]))
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": reply.finish_reason,
    }


def _reasoning(text: str) -> dict[str, str]:
    """Reasoning under both names that clients read: DeepSeek's, and that of vLLM and OpenRouter."""
    return {"reasoning_content": text, "reasoning": text}


def _logprobs(tokens: list[dict[str, Any]]) -> dict[str, Any]:
    return {"content": tokens, "refusal": None}


def _call_deltas(call: ToolCall, number: int) -> list[dict[str, Any]]:
    """Make the deltas of a call: its name, then its arguments."""
    whole = call_object(call)
    arguments = whole["function"]["arguments"]
    begun = {"index": number, **whole, "function": {"name": call.name, "arguments": ""}}
    return [
        {"tool_calls": [begun]},
        {"tool_calls": [{"index": number, "function": {"arguments": arguments}}]},
    ]


ROUTES = (Route("/v1/chat/completions", chat_completions, methods=["POST"]),)
