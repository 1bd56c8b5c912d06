"""An event loop in a thread, for what is asynchronous in a program that is not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal


class Background:
    """Runs coroutines in a thread of its own, begun with the first; closing cancels them."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._portal: BlockingPortal | None = None

    def start(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Future[Any]:
        """Start a coroutine function; cancelling the future cancels it."""
        if self._portal is None:
            from anyio.from_thread import start_blocking_portal

            self._portal = self._opened.enter_context(start_blocking_portal())
        return self._portal.start_task_soon(function, *arguments)

    def close(self) -> None:
        """Cancel what runs, and wait for its end."""
        portal, self._portal = self._portal, None
        if portal is not None:
            portal.call(portal.stop, True)
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
