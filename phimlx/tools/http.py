"""The HTTP client that MCP servers are asked with: what they answer has a size."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2

from phimlx.sizes import size_text

MAX_BYTES = 16_000_000  # of one answer
SECONDS = 30.0
SILENT_SECONDS = 300.0  # within a stream


def http_client(headers: Mapping[str, str]) -> httpx2.AsyncClient:
    """Make a client, with the headers of a server's entry; errors of HTTP are the caller's."""
    given = httpx2.Headers(dict(headers))
    given["accept-encoding"] = "identity"
    return httpx2.AsyncClient(
        headers=given,
        timeout=httpx2.Timeout(SECONDS, read=SILENT_SECONDS),
        transport=_Limited(),
    )


class _Limited(httpx2.AsyncHTTPTransport):
    """Refuses answers that are packed, and the rest of one that is too long; tells of locked doors.

    The package makes one error of all statuses.
    """

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        if response.status_code in (401, 403):
            await response.aclose()
            raise httpx2.RemoteProtocolError(
                f"it answers {response.status_code}; headers in its entry may say who asks"
            )
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise httpx2.RemoteProtocolError("the answer is packed, and nobody asked for that")
        response.stream = _Measured(response.stream)
        return response


class _Measured(httpx2.AsyncByteStream):
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._left = MAX_BYTES

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            self._left -= len(part)
            if self._left < 0:
                said = f"the answer has more than {size_text(MAX_BYTES)}"
                raise httpx2.RemoteProtocolError(said)
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
