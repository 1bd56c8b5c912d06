"""Runs the application with uvicorn: the socket, time-outs, signals."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import uvicorn

from phimlx.errors import PhimlxError, SettingsError
from phimlx.files import read_text, reason
from phimlx.server.app import App
from phimlx.server.guard import is_loopback
from phimlx.server.protocol import TimedProtocol
from phimlx.server.settings import ServerSettings

ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # and where that is reached from here
IDLE_SECONDS = 75
LAST_SECONDS = 1.0  # for streams to say why they end, when the worker has stopped
CONNECTIONS = 200  # at once; macOS gives a process 256 descriptors unless asked for more


def find_key(settings: ServerSettings, environment: str | None) -> str | None:
    """Find the key that clients must send: given, in a file, or in the environment.

    Raises:
        SettingsError: where the file cannot be read or is empty, or anyone could ask from beyond
            this machine.
    """
    key = settings.api_key or environment or None
    if settings.api_key_file is not None:
        key = read_text(Path(settings.api_key_file), SettingsError, limit=16_000).strip()
        if not key:
            raise SettingsError(f"{settings.api_key_file} holds no key.", hint="Write one into it.")
    if key is None and not is_loopback(settings.host) and not settings.no_auth:
        raise SettingsError(
            f"At {settings.host} anyone on the network could ask.",
            hint="Set a key with --api-key-file FILE or PHIMLX_API_KEY, or say --no-auth.",
        )
    return key


def listen(settings: ServerSettings) -> socket.socket:
    """Open the socket that the server listens at.

    Raises:
        PhimlxError: where the address is taken, or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    opened = socket.socket(family)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((settings.host, settings.port))
        opened.listen(128)
    except OSError as error:
        opened.close()
        raise PhimlxError(
            f"The server cannot listen at {settings.host}, port {settings.port}: {reason(error)}.",
            hint="Choose another with --port N; 0 takes a free one.",
        ) from error
    return opened


def address(settings: ServerSettings, opened: socket.socket) -> str:
    """Write where a server is reached, as a URL without a path."""
    host, port = opened.getsockname()[:2]
    return _url(settings, host, port)


def local_address(settings: ServerSettings, opened: socket.socket) -> str:
    """Write where it is reached from this machine."""
    host, port = opened.getsockname()[:2]
    return _url(settings, ANYWHERE.get(host, host), port)


def _url(settings: ServerSettings, host: str, port: int) -> str:
    where = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.ssl_certfile else 'http'}://{where}:{port}"


def read_certificate(settings: ServerSettings) -> None:
    """Read the certificate and its key, where there is one.

    Raises:
        SettingsError: where they cannot be used.
    """
    if settings.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password="")
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(
            f"{settings.ssl_certfile} is no certificate with its key: {reason(error)}.",
            hint="Give PEM files: --ssl-certfile FILE and, where the key is apart, --ssl-keyfile.",
        ) from error


class Server(uvicorn.Server):
    """uvicorn's server, which lets what runs finish within the grace time when it is told to stop.

    A second signal stops it at once.
    """

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self.application = app
        self._grace_seconds = settings.grace_seconds
        config = uvicorn.Config(
            app,
            http=TimedProtocol,
            limit_concurrency=CONNECTIONS,
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=math.ceil(settings.grace_seconds + LAST_SECONDS),
            server_header=False,
            date_header=False,
            ws="none",
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Replies that run on are told why they end, which who is cancelled is not.
        loop, worker = asyncio.get_running_loop(), self.application.service.worker
        ending = loop.call_later(self._grace_seconds, worker.end_requests)
        await super().shutdown(sockets)
        ending.cancel()

    def handle_exit(self, sig: int, frame: object) -> None:
        if self.should_exit:
            self.force_exit = True
        self.finish()

    def finish(self) -> None:
        """Let what runs finish, and stop."""
        self.should_exit = True
        self.application.service.draining = True


def serve(
    app: App, settings: ServerSettings, opened: socket.socket, on_start: Callable[[], object]
) -> None:
    """Serve until a signal says stop.

    Args:
        on_start: called when requests are answered.

    Machines that share its models stop it where they lose each other.

    Raises:
        PhimlxError: where the model cannot be loaded.
    """

    async def run() -> None:
        server = Server(app, settings)
        async with app.started():
            on_start()
            if app.machines is not None:
                loop = asyncio.get_running_loop()
                app.machines.on_lost(lambda _: loop.call_soon_threadsafe(server.finish))
            await server.serve(sockets=[opened])
            if not server.force_exit:
                await app.service.models.save_prefixes()
        if tasks := server.server_state.tasks:
            await asyncio.wait(tasks, timeout=LAST_SECONDS)

    asyncio.run(run())
