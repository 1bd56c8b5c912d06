"""OpenAI's chat completions and models.

Source: the OpenAPI description of OpenAI's API, and what its Python client reads.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from phimlx.generation.reply import Reply
from phimlx.prompt.tools import ToolCall
from phimlx.server.errors import RequestError, bad_request, explain
from phimlx.server.http import Body, Streamed, dump, event, read_body
from phimlx.server.models import Served
from phimlx.server.service import Answer, Ask, Service

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
}


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatBody(Body):
    """The body of a chat completion: OpenAI's fields, and those of vLLM that clients send."""

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=512)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int = Field(1, ge=1, le=8)
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None

    def ask(self) -> Ask:
        """Say it in no dialect. Raises RequestError."""
        stop = self.stop or ()
        options = {
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "seed": None if self.seed is None else self.seed % 2**64,
            "stop": tuple(each for each in ((stop,) if isinstance(stop, str) else stop) if each),
            "tools": self.tools or None,
        }
        return Ask(self.model, read_messages(self.messages), options, self.n)


MESSAGE_FIELDS = {
    "role", "content", "name", "tool_calls", "tool_call_id", "refusal", "audio", "function_call",
    "annotations", "reasoning_content", "reasoning",
}  # fmt: skip
PARTS = ("text", "image_url", "input_audio")


def read_messages(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put messages into the form of `phimlx.prompt.messages`.

    A developer is the system. Media are data or https addresses, never names of files.

    Raises:
        RequestError: naming the field that is wrong.
    """
    found = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        unknown = set(message) - MESSAGE_FIELDS
        if unknown:
            raise bad_request(f"{place} has no field {min(unknown)[:100]}.", place)
        role = message.get("role")
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind not in PARTS:
                    raise bad_request(
                        f"{place}.content has a part whose type is none of {', '.join(PARTS)}.",
                        f"{place}.content",
                    )
        elif content is None and not message.get("tool_calls"):
            content = message.get("refusal", "")
        read = {
            "role": "system" if role == "developer" else role,
            "content": content,
            "tool_calls": message.get("tool_calls"),
            "tool_call_id": message.get("tool_call_id"),
        }
        found.append({name: value for name, value in read.items() if value is not None})
    return found


@dataclass(frozen=True)
class Completion:
    """What the chunks of one response have in common."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": "phimlx", "choices": choices, **more}

    def chunk(self, index: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event(self.object("chat.completion.chunk", [choice]))


async def chat_completions(request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    service: Service = request.app.service
    body = await read_body(request, ChatBody)
    async with AsyncExitStack() as stack:
        answer = await stack.enter_async_context(service.answer(body.ask()))
        completion = Completion(answer.model)
        if body.stream:
            return Streamed(_stream(completion, answer, body.stream_options), stack.pop_all())
        replies = await answer.replies()
        choices = [_choice(index, reply) for index, reply in enumerate(replies)]
        return JSONResponse(completion.object("chat.completion", choices, usage=usage(replies)))


async def _stream(
    completion: Completion, answer: Answer, options: StreamOptions | None
) -> AsyncIterator[bytes]:
    try:
        for index in range(len(answer.generations)):
            yield completion.chunk(index, {"role": "assistant", "content": ""})
        async for index, chunk in answer.chunks():
            name = "reasoning_content" if chunk.kind == "reasoning" else "content"
            if chunk.text:
                yield completion.chunk(index, {name: chunk.text})
        replies = [request.reply for request in answer.requests]
        for index, reply in enumerate(replies):
            for number, call in enumerate(reply.tool_calls):
                yield completion.chunk(index, {"tool_calls": [call_object(call, number)]})
            yield completion.chunk(index, {}, reply.finish_reason)
        if options is not None and options.include_usage:
            yield event(completion.object("chat.completion.chunk", [], usage=usage(replies)))
    except Exception as error:
        yield event(error_object(explain(error)))
    yield event("[DONE]")


def _choice(index: int, reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": reply.text or (None if reply.tool_calls else ""),
        "refusal": None,
    }
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["tool_calls"] = [call_object(call) for call in reply.tool_calls]
    return {
        "index": index,
        "message": message,
        "logprobs": None,
        "finish_reason": reply.finish_reason,
    }


def call_object(call: ToolCall, index: int | None = None) -> dict[str, Any]:
    """Make a tool call as clients read it; `index` is for chunks of a stream."""
    function = {"name": call.name, "arguments": dump(call.arguments)}
    made = {"id": f"call_{token_hex(12)}", "type": "function", "function": function}
    return made if index is None else {"index": index, **made}


def usage(replies: list[Reply]) -> dict[str, Any]:
    """Count the tokens of replies to one prompt."""
    prompt = replies[0].stats.prompt_tokens
    generated = sum(reply.stats.generated_tokens for reply in replies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": replies[0].stats.cached_tokens},
    }


async def list_models(request: Request) -> Response:
    """`GET /v1/models`."""
    models = [_model_object(model) for model in request.app.service.models.list()]
    return JSONResponse({"object": "list", "data": models})


async def show_model(request: Request) -> Response:
    """`GET /v1/models/{model}`."""
    served = request.app.service.models.find(request.path_params["model"])
    return JSONResponse(_model_object(served))


def _model_object(model: Served) -> dict[str, Any]:
    length = model.context_length
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "phimlx",
        "context_length": length,
        "max_model_len": length,
    }


def error_object(error: RequestError) -> dict[str, Any]:
    """Make the body of an error."""
    kind = ERROR_TYPES.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }


ROUTES = (
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/models", list_models),
    Route("/v1/models/{model:path}", show_model),
)
