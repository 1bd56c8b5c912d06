"""Who may ask, and how much: what every request passes before a dialect reads it."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phimlx.server.errors import CLOSE, RequestError, explain
from phimlx.server.http import Json
from phimlx.server.settings import ServerSettings
from phimlx.sizes import size_text

log = logging.getLogger("phimlx.server")
access = logging.getLogger("phimlx.access")

MAX_PATH = 2000  # letters of a path
BODY_SECONDS = 60.0  # for a client to send a body, or to read what is sent
OPEN_PATHS = ("/", "/health", "/ui/session")
OPEN_FOLDER = "/ui/page/"  # what a browser loads before a person can give the key
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Whether a name means this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """Checks where a request comes from, its key and its body, and ends it when its client goes.

    Also gives each an id, writes the access log, and puts errors into the shape of the dialect.

    Args:
        shape: makes the body of an error, given the request's path.
        count: called with the path of the route, the status and the seconds of each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        key: str | None,
        shape: Callable[[str, RequestError], dict[str, Any]],
        count: Callable[[str, int, float], object],
    ) -> None:
        self._app = app
        self._settings = settings
        self._key = key
        self._shape = shape
        self._count = count
        self._names = {host.lower() for host in settings.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        request_id = f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        headers = Headers(scope=scope)
        cors = self._cors_headers(headers)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = request_id
                out["request-id"] = request_id  # where Anthropic's client looks
                out.update({"x-content-type-options": "nosniff", **cors})
            async with asyncio.timeout(BODY_SECONDS):  # a client that stops reading
                await send(message)

        try:
            try:
                self._check_origin(scope, headers)
                _check_head(scope, headers)
                if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                    await Response(status_code=204 if cors else 403)(scope, receive, sending)
                    return
                self._check_key(scope["path"], headers)
                body = await self._read_body(headers, receive)
                await self._run(scope, _given(body), receive, sending)
            except Exception as error:
                if status:
                    raise  # the stream has begun: nothing can be said any more
                known = explain(error)
                if known.status >= 500:
                    fault = error if known.status == 500 else None  # else nothing is wrong here
                    log.error("%s: %s", request_id, known.message, exc_info=fault)
                content = self._shape(scope["path"], known)
                response = Json(content, known.status, known.headers)
                await response(scope, receive, sending)
        except (TimeoutError, OSError):
            log.info("%s: the client has gone", request_id)
        finally:
            seconds = time.monotonic() - started
            route = scope.get("route")
            self._count("other" if route is None else route.path, status, seconds)
            path = scope["raw_path"].decode("ascii", "backslashreplace")[:200]
            line = f"request={request_id} method={scope['method']} path={path}"
            access.info("%s status=%d seconds=%.3f", line, status, seconds)

    async def _run(self, scope: Scope, given: Receive, receive: Receive, send: Send) -> None:
        """Run the application; its task ends when the client hangs up."""
        task = asyncio.ensure_future(self._app(scope, given, send))
        watcher = asyncio.ensure_future(_hang_up(receive))
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
                if task.cancelled():
                    return
            await task
        finally:
            task.cancel()
            watcher.cancel()

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """Raise where a page of another site asks, or a name that is not ours (DNS rebinding)."""
        given = _HOST.fullmatch(headers.get("host", ""))
        host = given[1].lower() if given else ""
        # Beyond this machine any address of it is good, for then there is a key.
        known = is_loopback(host) or host in self._names
        if not known and (is_loopback(self._settings.host) or not _is_address(host)):
            raise RequestError(
                403,
                f"This server is not reached as {host[:100]!r} (--allowed-host).",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is None or origin in self._settings.cors:
            return
        if origin.partition("://")[2].lower() != headers.get("host", "").lower():
            raise RequestError(
                403,
                f"Pages of {origin[:100]} may not ask here (--cors).",
                code="origin_not_allowed",
            )

    def _cors_headers(self, headers: Headers) -> Mapping[str, str]:
        origin = headers.get("origin")
        if origin is None or origin not in self._settings.cors:
            return {}
        return {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
            "access-control-allow-headers": headers.get("access-control-request-headers", "*"),
            "access-control-expose-headers": "x-request-id",
            "access-control-max-age": "600",
            "vary": "origin",
        }

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return
        given = headers.get("x-api-key", "")
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = token.strip()
        if not hmac.compare_digest(given.encode(), self._key.encode()):
            raise RequestError(
                401,
                "The API key is missing or wrong.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        most = self._settings.max_body
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            raise _too_large(most)
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise _too_large(most)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise RequestError(
                408, "The body did not come in time.", code="timeout", headers=CLOSE
            ) from None


def _check_head(scope: Scope, headers: Headers) -> None:
    """Raise for what no dialect can read, whatever it is asked."""
    if len(scope["raw_path"]) > MAX_PATH:
        raise RequestError(414, f"The path has more than {MAX_PATH} letters.", headers=CLOSE)
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise RequestError(
            415,
            f"The body is packed ({encoding[:100]}); send it plain, without Content-Encoding.",
            code="unsupported_encoding",
        )


def _too_large(most: int) -> RequestError:
    message = f"The body is larger than {size_text(most)}."
    return RequestError(413, message, code="too_large", headers=CLOSE)


def _is_address(host: str) -> bool:
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _given(body: bytes) -> Receive:
    """Make a `receive` that hands over a body that has been read."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()  # until the task is cancelled: the guard waits for a hang-up
        return {"type": "http.disconnect"}

    return receive


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
