"""HTTP/1.1 with a deadline for the head of each request, which uvicorn leaves without one.

Where there are as many connections as may be, the one goes that has been silent longest.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0


class TimedProtocol(H11Protocol):
    """Closes a connection whose client takes its time with a request's line and headers."""

    _timer: asyncio.TimerHandle | None = None
    _heard = 0.0  # when something came, by the loop's clock

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._heard = self.loop.time()
        self._expect_head()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        self._heard = self.loop.time()
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _make_room(self) -> None:
        """Close another connection on which nothing is answered, where a request would be one too
        many for uvicorn.
        """
        if self.limit_concurrency is None or len(self.connections) < self.limit_concurrency:
            return
        idle = [
            each
            for each in self.connections
            if isinstance(each, TimedProtocol) and each._is_idle and each is not self
        ]
        if idle:
            silent = min(idle, key=lambda each: each._heard)
            self.connections.discard(silent)  # which is only told of its end later
            silent.transport.close()

    def _expect_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
