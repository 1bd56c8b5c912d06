"""Anthropic's messages, as its Python client and Claude Code use them.

Source: the reference of Anthropic's API, and the types of its Python client.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from secrets import token_hex
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phimlx.generation.reply import Chunk, Reply
from phimlx.prompt.tools import ToolCall
from phimlx.server.anthropic_body import MessagesBody, PromptBody
from phimlx.server.errors import RequestError, explain
from phimlx.server.http import Json, Streamed, dump, event, read_body
from phimlx.server.service import Answer, Service

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# What Anthropic says of these in its own words, by our code.
PHRASES = {
    "unknown_parameter": "Extra inputs are not permitted",
    "missing_required_parameter": "Field required",
}
SIGNATURE = "phimlx"  # of reasoning; clients send it back, and nothing depends on it

Event = dict[str, Any]


async def messages(request: Request) -> Response:
    """`POST /v1/messages`."""
    service: Service = request.app.service
    body = await read_body(request, MessagesBody)
    async with AsyncExitStack() as stack:
        answer = await stack.enter_async_context(service.answer(body.ask()))
        written = Written(body, answer)
        if body.stream:
            return Streamed(_stream(written, answer), stack.pop_all(), _sent({"type": "ping"}))
        async for _, chunk in answer.chunks():
            written.add(chunk)
        return Json(written.message())


async def count_tokens(request: Request) -> Response:
    """`POST /v1/messages/count_tokens`."""
    service: Service = request.app.service
    body = await read_body(request, PromptBody)
    return Json({"input_tokens": await service.count_tokens(body.ask())})


class Written:
    """A message as it comes to be, and the events that tell of it.

    Attributes:
        blocks: the content so far.
    """

    def __init__(self, body: MessagesBody, answer: Answer) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._body = body
        self._model = answer.model
        self._context_length = answer.phi.context_length
        self._id = f"msg_{token_hex(12)}"
        self._reply = answer.requests[0].reply
        self._calls = 0

    def message(self) -> dict[str, Any]:
        """The message so far, whole where the reply is."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": list(self.blocks),
            **self._ended(),
            "usage": usage(self._reply),
        }

    def begin(self) -> list[Event]:
        """Make the events before any content."""
        return [{"type": "message_start", "message": self.message()}, {"type": "ping"}]

    def add(self, chunk: Chunk) -> list[Event]:
        """Take a chunk of the reply; make its events."""
        if chunk.kind == "reasoning":
            return self._think(chunk.text) if self._body.shows_thinking and chunk.text else []
        made = self._block("text", text="") if chunk.text else []
        if chunk.text:
            self.blocks[-1]["text"] += chunk.text
            made.append(self._delta("text_delta", text=chunk.text))
        for call in chunk.tool_calls:
            self._calls += 1
            if self._calls == 1 or self._body.calls_in_parallel:
                made += self._call(call)
        return made

    def end(self) -> list[Event]:
        """Make the events after the content."""
        ended = {"type": "message_delta", "delta": self._ended(), "usage": usage(self._reply)}
        return [*self._close(), ended, {"type": "message_stop"}]

    def _think(self, text: str) -> list[Event]:
        made = self._block("thinking", thinking="", signature="")
        if not self._body.omits_thinking:
            self.blocks[-1]["thinking"] += text
            made.append(self._delta("thinking_delta", thinking=text))
        return made

    def _call(self, call: ToolCall) -> list[Event]:
        made = self._close()
        self.blocks.append(
            {"type": "tool_use", "id": f"toolu_{token_hex(12)}", "name": call.name, "input": {}}
        )
        made.append(self._start())
        self.blocks[-1]["input"] = call.arguments
        made.append(self._delta("input_json_delta", partial_json=dump(call.arguments)))
        return made

    def _block(self, kind: str, **empty: str) -> list[Event]:
        """See that the last block is of a kind."""
        if self.blocks and self.blocks[-1]["type"] == kind:
            return []
        made = self._close()
        self.blocks.append({"type": kind, **empty})
        return [*made, self._start()]

    def _start(self) -> Event:
        index, block = len(self.blocks) - 1, dict(self.blocks[-1])
        return {"type": "content_block_start", "index": index, "content_block": block}

    def _delta(self, kind: str, **delta: str) -> Event:
        index = len(self.blocks) - 1
        return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **delta}}

    def _close(self) -> list[Event]:
        if not self.blocks:
            return []
        made = []
        if self.blocks[-1]["type"] == "thinking":
            self.blocks[-1]["signature"] = SIGNATURE
            made = [self._delta("signature_delta", signature=SIGNATURE)]
        return [*made, {"type": "content_block_stop", "index": len(self.blocks) - 1}]

    def _ended(self) -> dict[str, Any]:
        """Tell why the reply ended; nothing while it has not."""
        reply, stats = self._reply, self._reply.stats
        stop = reply.stop_string if reply.stop_string in self._body.stop_sequences else None
        reason = {"cancelled": None, "tool_calls": "tool_use", "length": "max_tokens"}.get(
            reply.finish_reason, "end_turn" if stop is None else "stop_sequence"
        )
        full = stats.prompt_tokens + stats.generated_tokens >= self._context_length
        if reason == "max_tokens" and full and stats.generated_tokens < self._body.max_tokens:
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": stop}


async def _stream(written: Written, answer: Answer) -> AsyncIterator[bytes]:
    try:
        for made in written.begin():
            yield _sent(made)
        async for _, chunk in answer.chunks():
            for made in written.add(chunk):
                yield _sent(made)
        for made in written.end():
            yield _sent(made)
    except Exception as error:
        yield _sent(error_object(explain(error)))


def _sent(made: Event) -> bytes:
    return event(made, made["type"])


def usage(reply: Reply) -> dict[str, Any]:
    """Count the tokens of a reply so far and of its prompt."""
    stats = reply.stats
    return {
        "input_tokens": stats.prompt_tokens - stats.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": stats.cached_tokens,
        "output_tokens": stats.generated_tokens,
    }


def error_object(error: RequestError) -> dict[str, Any]:
    """Make the body of an error."""
    kind = ERROR_TYPES.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "api_error"
    phrase = PHRASES.get(error.code or "")
    message = f"{error.param}: {phrase}" if phrase and error.param else error.message
    return {"type": "error", "error": {"type": kind, "message": message}}


ROUTES = (
    Route("/v1/messages", messages, methods=["POST"]),
    Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
)
