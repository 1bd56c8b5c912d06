"""The application: routes of every dialect behind one guard, over one worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from secrets import token_hex
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from phimlx.remote.notes import proof
from phimlx.server import anthropic, ollama, openai, own, transcriptions, ui
from phimlx.server.errors import RequestError
from phimlx.server.guard import Guard
from phimlx.server.models import Models
from phimlx.server.service import Service
from phimlx.server.settings import ServerSettings
from phimlx.server.worker import Worker
from phimlx.shared_model import Machines

MAX_NONCE = 64  # characters
SWEEP_SECONDS = 1.0  # between looks for models that nobody uses, and after the worker

log = logging.getLogger("phimlx.server")

DIALECTS: Mapping[str, tuple[Sequence[Route], Callable[[RequestError], dict[str, Any]]]] = {
    "/": ((*openai.ROUTES, *transcriptions.ROUTES, *own.ROUTES), openai.error_object),
    "/v1/messages": (anthropic.ROUTES, anthropic.error_object),
    "/ui/": (ui.ROUTES, openai.error_object),
    "/api/": (ollama.ROUTES, ollama.error_object),
}
"""Paths that begin so -> routes, and the shape of errors; the longest beginning that fits."""


class App:
    """The server as an ASGI application.

    Attributes:
        service: answers requests; there in the block of `started`.
        key: that clients must send; None where anyone may ask.
        token: for which a page gets the key, once.
        keeps_history: whether the page keeps conversations in the history of `phimlx chat`.
        machines: which share its models; None where this one has them whole.
        secret: by which who knows it tells this server from another: `phimlx.remote.notes`.
    """

    service: Service

    def __init__(
        self,
        settings: ServerSettings,
        key: str | None = None,
        token: str | None = None,
        keeps_history: bool = True,
        machines: Machines | None = None,
    ) -> None:
        self._settings = settings
        self.machines = machines
        self.key, self.token, self.keeps_history = key, token, keeps_history
        self.secret = token_hex(32)
        routes = [
            Route("/health", health),
            Route("/metrics", metrics),
            *(r for own, _ in DIALECTS.values() for r in own),
        ]
        self._router = Router(routes, redirect_slashes=False, default=nowhere)
        self._guard = Guard(self._router, settings, key, error_shape, self._count)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self._guard(scope, receive, send)

    def _count(self, path: str, status: int, seconds: float) -> None:
        self.service.metrics.count_request(path, status, seconds)

    @asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        """Hold the worker, and the model where there is but one, for the block.

        Raises:
            PhimlxError: where that model cannot be loaded.
        """
        worker = Worker(asyncio.get_running_loop())
        models = Models(self._settings, worker, self.machines)
        self.service = Service(self._settings, models, worker)
        worker.start()
        sweeper = asyncio.ensure_future(_sweep(self.service))
        try:
            if self._settings.model is not None:
                given = models.list()[: 1 + len(self._settings.adapters)]
                for served in given:  # loaded before the first request comes
                    async with models.use(served.name):
                        pass
            yield
        finally:
            sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await sweeper
            self.service.close()
            await asyncio.to_thread(worker.stop)


def error_shape(path: str, error: RequestError) -> dict[str, Any]:
    """Put an error into the shape of the dialect that a path belongs to."""
    begin = max((begin for begin in DIALECTS if path.startswith(begin)), key=len, default="/")
    return DIALECTS[begin][1](error)


async def nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse what no route is for. Raises RequestError."""
    raise RequestError(
        404,
        f"There is nothing at {scope['path'][:100]}. OpenAI's API is at /v1, Anthropic's at "
        "/v1/messages, Ollama's at /api.",
    )


async def health(request: Request) -> Response:
    """`GET /health`: whether the server computes, and what it holds; proves itself on a nonce."""
    service: Service = request.app.service
    state, nonce = service.state, request.query_params.get("nonce", "")[:MAX_NONCE]
    return JSONResponse(
        {
            "status": state,
            "models": [loaded.served.name for loaded in service.models.loaded],
            "running": service.running,
            "restarts": service.worker.restarts,
            "step_seconds": round(service.worker.busy_seconds, 3),
            **({"proof": proof(request.app.secret, nonce)} if nonce else {}),
        },
        200 if state == "ok" else 503,
    )


async def metrics(request: Request) -> Response:
    """`GET /metrics`: what Prometheus reads."""
    return Response(request.app.service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _sweep(service: Service) -> None:
    """Unload models that nobody uses, and watch over the worker."""
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        try:
            await service.look_after_worker()
            await service.models.unload_idle()
        except Exception:
            log.exception("models cannot be looked after")
