"""A client that stops reading is let go of, with what it had asked for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from phimlx.server import guard
from phimlx.server.guard import Guard
from phimlx.server.settings import ServerSettings

SCOPE = {
    "type": "http",
    "method": "GET",
    "path": "/",
    "raw_path": b"/",
    "headers": [(b"host", b"127.0.0.1")],
}


@pytest.mark.parametrize("reads", [0, 1, 3])  # messages, the head of the response among them
def test_a_client_that_stops_reading_ends_its_request(
    monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)
    sent: list[Message] = []
    let_go: list[bool] = []
    counted: list[int] = []

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": b"more", "more_body": True})
        finally:
            let_go.append(True)

    async def send(message: Message) -> None:
        if len(sent) == reads:
            await asyncio.Event().wait()  # the client's buffers are full, and it reads no more
        sent.append(message)

    async def receive() -> Message:
        if not asked:
            asked.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    asked: list[bool] = []

    def shape(path: str, error: Any) -> dict[str, Any]:
        return {"error": str(error)}

    guarded = Guard(
        stream, ServerSettings(), None, shape, lambda path, status, seconds: counted.append(status)
    )
    asyncio.run(asyncio.wait_for(guarded(dict(SCOPE), receive, send), 30))
    assert (len(sent), let_go, counted) == (reads, [True], [200])
