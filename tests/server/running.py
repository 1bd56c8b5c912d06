"""A server for tests: the real one, on a free port, in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from phimlx.server.app import App
from phimlx.server.run import Server, listen
from phimlx.server.settings import ServerSettings

SECONDS = 60.0
# Nano's replies are short; of this one it says a letter again and again, as long as it may.
LONG: dict[str, Any] = {
    "model": "nano", "messages": [{"role": "user", "content": "Tell me a story."}], "seed": 1,
    "temperature": 1, "presence_penalty": -2, "frequency_penalty": -2, "max_tokens": 900,
}  # fmt: skip


@dataclass(frozen=True)
class Running:
    """A server that runs.

    Attributes:
        url: of its root, without a slash at the end.
        client: for its root.
    """

    url: str
    app: App
    client: httpx2.Client

    def post(self, path: str, body: Any, **more: Any) -> httpx2.Response:
        return self.client.post(path, json=body, **more)


@contextmanager
def running(key: str | None = None, **settings: Any) -> Iterator[Running]:
    """Run a server for the block."""
    made = ServerSettings(port=0, **settings)
    app = App(made, key)
    with listen(made) as opened:
        server = Server(app, made)
        started = threading.Event()

        async def serve() -> None:
            async with app.started():
                started.set()  # the socket listens already
                await server.serve(sockets=[opened])

        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        assert started.wait(SECONDS)
        url = f"http://127.0.0.1:{opened.getsockname()[1]}"
        try:
            with httpx2.Client(base_url=url, timeout=SECONDS, trust_env=False) as client:
                yield Running(url, app, client)
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive()
