"""Bodies of requests, read once, and responses that come piece by piece."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from phimlx.server.errors import bad_request, json_type_error

PING_SECONDS = 10.0
MAX_MESSAGES = 4096  # of a conversation: an agent adds one for each call and each result
DEEPEST = 100  # levels of a body's JSON


class Body(BaseModel):
    """The body of a request, whose values keep their JSON types; null is the same as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


AnyBody = TypeVar("AnyBody", bound=Body)


async def read_body(request: Request, kind: type[AnyBody]) -> AnyBody:
    """Read and check a JSON body.

    Raises:
        RequestError: naming the field that is wrong.
    """
    try:
        value = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise bad_request("The body is not JSON.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("The body is not a JSON object.", code="invalid_json")
    if _is_deep(value):
        raise bad_request(f"The body is nested more than {DEEPEST} deep.", code="invalid_json")
    try:
        return kind.model_validate(without_nulls(value))
    except ValidationError as error:
        raise json_type_error(error.errors(include_url=False)) from None  # type: ignore[arg-type]


def without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """Leave out fields that are null, which many clients send for what they do not set."""
    return {name: each for name, each in value.items() if each is not None}


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return bool(level)


def event(data: Any, name: str | None = None) -> bytes:
    """Write a server-sent event."""
    text = data if isinstance(data, str) else dump(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def dump(value: Any) -> str:
    """Write JSON on one line; what is half a character is written as an escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()


class Streamed(Response):
    """A response that comes piece by piece, and holds something until it has ended.

    Args:
        pieces: of the body.
        held: closed when the response has been sent, or its client has gone.
        ping: what is sent where nothing comes for a while.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        held: AsyncExitStack,
        ping: bytes | None = b": ping\n\n",
        media_type: str | None = None,
    ) -> None:
        super().__init__(
            media_type=media_type,
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        del self.headers["content-length"]
        self._pieces = pieces
        self._held = held
        self._ping = ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            headers = self.raw_headers
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async with aclosing(self._pinged()) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pinged(self) -> AsyncIterator[bytes]:
        coming = asyncio.ensure_future(anext(self._pieces, None))
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=PING_SECONDS)
                if not done:
                    if self._ping is not None:
                        yield self._ping
                    continue
                piece = coming.result()
                if piece is None:
                    return
                yield piece
                coming = asyncio.ensure_future(anext(self._pieces, None))
        finally:
            coming.cancel()
