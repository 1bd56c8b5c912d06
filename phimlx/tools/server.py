"""One MCP server: started or reached, asked, stopped, and begun again where it has ended."""

from __future__ import annotations

import base64
import logging
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from phimlx.errors import ToolError
from phimlx.extras import import_extra
from phimlx.tools.background import Background
from phimlx.tools.config import ServerConfig
from phimlx.tools.results import ToolResult, capped
from phimlx.tools.untrusted import clean, clean_line

if TYPE_CHECKING:
    from mcp import Client

START_SECONDS = 60.0  # a launcher may fetch the server first
CALL_SECONDS = 60.0
ALIVE_SECONDS = 5.0  # for a sign of life of one that let a call wait
MAX_PAGES = 50
TAIL_LINES = 5
MAX_PROBLEM = 300

logging.getLogger("mcp").addHandler(logging.NullHandler())  # it logs what servers do wrong


class Server:
    """A connection to one server, held in the background.

    Attributes:
        problem: why it is down; None while it is up, and before it is begun.
        tools: what it offered when it was begun first, as it told it.
    """

    def __init__(self, config: ServerConfig, background: Background) -> None:
        self.config = config
        self.name = config.name
        self.problem: str | None = None
        self.tools: list[Any] = []
        self._background = background
        self._client: Client | None = None
        self._serving: Future[Any] | None = None
        self._tail = Tail()
        self._unread = False

    @property
    def is_up(self) -> bool:
        """Whether it can be called, as far as is known."""
        return self._client is not None and self.problem is None

    def start(self) -> None:
        """Begin, and learn what it offers; Ctrl-C gives up.

        Raises:
            ToolError: where it does not answer; it is down then.
        """
        self.stop()
        ready: Future[list[Any]] = Future()
        self.problem, self._unread = None, False
        self._serving = self._background.start(self._serve, ready)
        try:
            wait([ready, self._serving], START_SECONDS + 5, FIRST_COMPLETED)
        except BaseException:
            self.stop("its start was stopped")
            raise
        if ready.done():
            self.tools = self.tools or ready.result()
            self._tail.forget()
            return
        error = self._serving.exception() if self._serving.done() else TimeoutError()
        self.stop(self._reason(error))
        raise ToolError(
            f"The MCP server {self.name} is not there: {self.problem}.",
            hint=f"Try it alone: {' '.join(self.config.command) or self.config.url}",
        )

    def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Call a tool; what goes wrong is told in the result.

        Raises:
            KeyboardInterrupt: where it is stopped; the server is told so, and stays.
        """
        if not self.is_up:
            try:
                self.start()
            except ToolError as error:
                return ToolResult(f"Error: {error}", failed=True)
        seconds = self.config.timeout or CALL_SECONDS
        future = self._background.start(self._ask, name, dict(arguments), seconds)
        try:
            result = _text_of(future.result())
            self._tail.forget()
            return result
        except TimeoutError:
            return self._late(name, seconds)
        except KeyboardInterrupt:
            future.cancel()
            raise
        except Exception as error:
            if self._refused(error):
                refusal = self._reason(error)
                self._tail.forget()
                return ToolResult(f"Error: {refusal}", failed=True)
            self.stop(self._reason(error))
            return ToolResult(f"Error: {name} is lost: {self.problem}.", failed=True)

    def stop(self, problem: str | None = None) -> None:
        """End it; a process is given a moment, then killed."""
        serving, self._serving, self._client = self._serving, None, None
        self.problem = self.problem or problem
        if serving is not None:
            serving.cancel()

    def _late(self, name: str, seconds: float) -> ToolResult:
        """Tell of a call that took too long; a server without a sign of life is stopped."""
        said = f"{name} took more than {seconds:g} seconds"
        try:
            self._background.start(self._alive).result()
        except Exception:
            self.stop(f"{said}, and the server did not answer any more")
            return ToolResult(f"Error: {self.problem}.", failed=True)
        return ToolResult(f"Error: {said}, and was stopped.", failed=True)

    async def _serve(self, ready: Future[list[Any]]) -> None:
        """Hold the connection until it is cancelled."""
        import anyio
        from mcp import Client

        try:
            with anyio.fail_after(START_SECONDS) as limit:
                async with Client(self._transport(), cache=None) as client:
                    tools = await _list(client)
                    limit.deadline = float("inf")
                    self._client = client
                    ready.set_result(tools)
                    await anyio.sleep_forever()
        finally:
            self._tail.close()

    async def _ask(self, name: str, arguments: dict[str, Any], seconds: float) -> Any:
        import anyio

        assert self._client is not None
        with anyio.fail_after(seconds):
            return await self._client.call_tool(name, arguments, read_timeout_seconds=2 * seconds)

    async def _alive(self) -> None:
        import anyio

        assert self._client is not None
        with anyio.fail_after(ALIVE_SECONDS):
            await self._client.list_tools()

    @asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        config = self.config
        if config.url is not None:
            from mcp.client.streamable_http import streamable_http_client

            from phimlx.tools.http import http_client

            async with (
                http_client(config.headers) as http,
                streamable_http_client(config.url, http_client=http) as streams,
            ):
                yield streams
            return
        from mcp.client.stdio import StdioServerParameters, stdio_client

        command, *args = config.command
        started = StdioServerParameters(
            command=command, args=args, env=dict(config.env), cwd=config.cwd
        )
        async with stdio_client(started, self._tail.open()) as (read, write):
            yield _Watched(read, self._ended, self._misread), write

    def _misread(self) -> None:
        self._unread = True

    def _ended(self) -> None:
        if self._client is not None and self.problem is None:
            self.problem = self._tail.said("it ended")

    def _refused(self, error: Exception) -> bool:
        """Whether a server that goes on has said no."""
        from mcp import MCPError
        from mcp_types import INTERNAL_ERROR, INVALID_PARAMS, METHOD_NOT_FOUND

        said_no = (INTERNAL_ERROR, INVALID_PARAMS, METHOD_NOT_FOUND)
        return self.problem is None and isinstance(error, MCPError) and error.code in said_no

    def _reason(self, error: BaseException | None) -> str:
        """What happened, in words."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, FileNotFoundError):
            said = f"there is no {error.filename or self.config.command[0]}"
        elif isinstance(error, TimeoutError):
            said = f"it did not answer within {START_SECONDS:g} seconds"
            said += ", and sent what is no message" if self._unread else ""
        elif isinstance(error, OSError) and error.strerror:
            said = error.strerror
        else:
            said = str(error) or type(error).__name__
        return self._tail.said(clean_line(said, MAX_PROBLEM).rstrip("."))


class Tail:
    """What a process says on stderr after its last answer, for nobody to see while all is well."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._writer: Any = None
        self._reader: threading.Thread | None = None

    def open(self) -> Any:
        """Make a file for the process to write to."""
        self.close()
        self._lines.clear()
        reading, writing = os.pipe()
        self._writer = os.fdopen(writing, "w")
        self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._reader.start()
        return self._writer

    def close(self) -> None:
        """Let the process alone write; what it has written is read to its end."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def forget(self) -> None:
        """Let go of what was said up to here: it is no reason for what comes."""
        self._lines.clear()

    def said(self, reason: str) -> str:
        """A reason, and the last line of what was said about it."""
        self.close()
        if self._reader is not None:
            self._reader.join(0.5)  # a child of its own may hold it open
        last = next((line for line in reversed(self._lines) if line), "")
        return f"{reason} ({last})" if last else reason

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb") as file:
            while line := file.readline(4096):
                self._lines.append(clean_line(line.decode("utf-8", "replace"), MAX_PROBLEM))


class _Watched:
    """The stream of a server's messages, which tells of its end and of what is no message."""

    def __init__(self, stream: Any, ended: Callable[[], None], misread: Callable[[], None]) -> None:
        self._stream = stream
        self._ended = ended
        self._misread = misread

    async def receive(self) -> Any:
        import anyio

        try:
            item = await self._stream.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            self._ended()
            raise
        if isinstance(item, Exception):
            self._misread()
        return item

    async def aclose(self) -> None:
        await self._stream.aclose()

    def __aiter__(self) -> _Watched:
        return self

    async def __anext__(self) -> Any:
        import anyio

        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> _Watched:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def require_mcp() -> None:
    """Raise ToolError where the extra is not installed."""
    import_extra("mcp", "mcp", "MCP servers need the package mcp.", ToolError)


async def _list(client: Client) -> list[Any]:
    tools: list[Any] = []
    cursor = None
    for _ in range(MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            break
    return tools


def _text_of(result: Any) -> ToolResult:
    """What a tool gave, as a text for the model."""
    texts = [_block(block) for block in result.content]
    if not texts and result.structured_content is not None:
        from phimlx.prompt.functions import value_text

        texts = [value_text(result.structured_content)]
    text = capped(clean("\n".join(texts)))
    return ToolResult(f"Error: {text}" if result.is_error else text, result.is_error)


def _block(block: Any) -> str:
    match block.type:
        case "text":
            return str(block.text)
        case "image" | "audio":
            size = len(base64.b64decode(block.data, validate=False))
            return f"[{block.mime_type}, {size:,} bytes, which cannot be shown]"
        case "resource_link":
            return f"[{block.name}: {block.uri}]"
        case _:
            text = getattr(block.resource, "text", None)
            return str(text) if text is not None else f"[{block.resource.uri}, no text]"
