"""Ollama's chat and completion, as programs use them that know only Ollama.

Fields that Ollama does not know are ignored, as it does. Its options that say how a model is held
(`num_ctx`, `num_gpu`, `num_thread`, …) change nothing here: the context is always the model's own.

Source: Ollama's description of its API, the types of its Python client, and its server's code.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from secrets import token_hex
from time import perf_counter
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phimlx.generation.logprobs import TokenLogprob
from phimlx.generation.reply import Chunk
from phimlx.server import ollama_models
from phimlx.server.errors import RequestError, bad_request, explain
from phimlx.server.http import Json, Streamed, dump, read_body
from phimlx.server.logprobs import token_objects
from phimlx.server.ollama_body import ChatBody, GenerateBody, ReplyBody, own_name
from phimlx.server.service import Answer, Service

NDJSON = "application/x-ndjson"


def answered(kind: type[ReplyBody]) -> Callable[[Request], Any]:
    """Make the function of a route that takes a body and replies."""

    async def route(request: Request) -> Response:
        service: Service = request.app.service
        started = perf_counter()
        body = await read_body(request, kind)
        if body.only_loads:
            return Json(await _load(service, body))
        ask = body.ask()
        await _check_think(service, body)
        async with AsyncExitStack() as stack:
            answer = await stack.enter_async_context(service.answer(ask))
            lines = Lines(body, answer, started)
            if body.stream:
                return Streamed(_stream(lines, answer), stack.pop_all(), None, NDJSON)
            [reply] = await answer.replies()
            more: dict[str, Any] = {}
            if reply.reasoning and lines.shows_thinking:
                more["thinking"] = reply.reasoning
            if reply.tool_calls:
                more["tool_calls"] = lines.calls(reply.tool_calls)
            return Json(lines.last(reply.text, reply.logprobs[: reply.said], **more))

    return route


class Lines:
    """Makes the lines of a response: objects of JSON."""

    def __init__(self, body: ReplyBody, answer: Answer, started: float) -> None:
        self._body = body
        self._answer = answer
        self._started = started
        self._calls = 0
        self.shows_thinking = body.think is not False

    def line(self, text: str, logprobs: Sequence[TokenLogprob] = (), **more: Any) -> dict[str, Any]:
        """Make a line with a piece of the reply."""
        told = {"logprobs": token_objects(self._answer.phi, logprobs)} if logprobs else {}
        return {**_head(self._body), **self._body.piece(text, **more), **told, "done": False}

    def of(self, chunk: Chunk) -> dict[str, Any] | None:
        """Make the line of a chunk; None where it says nothing."""
        if chunk.tool_calls:
            return self.line("", chunk.logprobs, tool_calls=self.calls(chunk.tool_calls))
        if not chunk.text and not chunk.logprobs:
            return None
        if chunk.kind == "reasoning":
            shown = {"thinking": chunk.text} if self.shows_thinking else {}
            return self.line("", chunk.logprobs, **shown)
        return self.line(chunk.text, chunk.logprobs)

    def calls(self, calls: Sequence[Any]) -> list[dict[str, Any]]:
        """Make the objects of tool calls."""
        made = []
        for call in calls:
            function = {"index": self._calls, "name": call.name, "arguments": call.arguments}
            made.append({"id": f"call_{token_hex(4)}", "function": function})
            self._calls += 1
        return made

    def last(
        self, text: str = "", logprobs: Sequence[TokenLogprob] = (), **more: Any
    ) -> dict[str, Any]:
        """Make the line that ends the response."""
        [request] = self._answer.requests
        reply, stats = request.reply, request.reply.stats
        return {
            **self.line(text, logprobs, **more),
            "done": True,
            "done_reason": "length" if reply.finish_reason == "length" else "stop",
            **self._body.context_of(request.tokens),
            "total_duration": _nanoseconds(perf_counter() - self._started),
            "load_duration": _nanoseconds(self._answer.load_seconds),
            "prompt_eval_count": stats.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(stats.prefill_seconds),
            "eval_count": stats.generated_tokens,
            "eval_duration": _nanoseconds(stats.generate_seconds),
        }


async def _stream(lines: Lines, answer: Answer) -> AsyncIterator[bytes]:
    try:
        async for _, chunk in answer.chunks():
            line = lines.of(chunk)
            if line is not None:
                yield _written(line)
        yield _written(lines.last())
    except Exception as error:
        yield _written(error_object(explain(error)))


def _written(line: dict[str, Any]) -> bytes:
    return f"{dump(line)}\n".encode()


async def _load(service: Service, body: ReplyBody) -> dict[str, Any]:
    """Load or unload a model, and nothing else."""
    name, reason = own_name(body.model), "load"
    if body.keep_alive == 0:
        await service.models.release(name)
        reason = "unload"
    else:
        async with service.hold(name, keep_alive=body.keep_alive):
            pass
    return {**_head(body), **body.piece(""), "done": True, "done_reason": reason}


async def _check_think(service: Service, body: ReplyBody) -> None:
    if not body.think:
        return
    served = service.models.find(own_name(body.model))
    if not await asyncio.to_thread(ollama_models.reasons, served):
        raise bad_request(f"{body.model} does not support thinking.", "think")
    if body.think is not True:
        raise bad_request(f"think value {body.think} is not supported for this model.", "think")


def _head(body: ReplyBody) -> dict[str, Any]:
    return {"model": body.model, "created_at": ollama_models.timestamp(datetime.now(UTC))}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def error_object(error: RequestError) -> dict[str, Any]:
    """Make the body of an error."""
    return {"error": error.message}


ROUTES = (
    Route("/api/chat", answered(ChatBody), methods=["POST"]),
    Route("/api/generate", answered(GenerateBody), methods=["POST"]),
    *ollama_models.ROUTES,
)
