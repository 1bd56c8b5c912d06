"""Servers that are none of ours, and what they say."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from phimlx.generation.reply import Stats

MODEL: dict[str, Any] = {
    "name": "nano",
    "stamp": "0",
    "context_length": 100,
    "is_base": False,
    "takes_media": False,
    "hears": False,
    "chat_form": None,
    "max_tokens": None,
    "sampling": {"temperature": 0.0},
}

Answer = tuple[int, bytes]


def listen(answer: Callable[[str], Answer], **headers: str) -> ThreadingHTTPServer:
    """Answer requests by their path in a thread, and hang up after each."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            status, body = answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def url_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@contextmanager
def answering(status: int, body: bytes, **headers: str) -> Iterator[str]:
    """A server that gives one answer to everything; yields its address."""
    with listen(lambda path: (status, body), **headers) as server:
        try:
            yield url_of(server)
        finally:
            server.shutdown()


def hostile_server(text: str, status: int = 200) -> str:
    """The address of a server that puts a text wherever there is one, or refuses with it."""
    told = text.encode(errors="replace").decode()
    call = {"index": 0, "function": {"name": told, "arguments": json.dumps({told: told})}}
    stream = stream_of(
        piece(delta={"reasoning_content": told}),
        piece(delta={"content": told}),
        piece(delta={"tool_calls": [call]}),
        piece(delta={}, finish_reason="tool_calls", warnings=[told]),
    )
    model = json.dumps(MODEL | {"name": told}).encode()
    said = {
        "/phimlx/models": b'{"models": [%s]}' % model,
        "/v1/chat/completions": stream,
    }
    refusal = json.dumps({"error": {"message": told}}).encode()
    return url_of(
        listen(lambda path: (status, refusal) if status != 200 else (200, said.get(path, model)))
    )


def piece(**change: Any) -> dict[str, Any]:
    choice = {"delta": {"content": "Hi"}, "finish_reason": None}
    own = {name: change.pop(name) for name in list(change) if name in choice}
    return {"choices": [choice | own], "stats": Stats().as_object(), **change}


def stream_of(*events: Any, end: bytes = b"data: [DONE]\n\n") -> bytes:
    return b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in events) + end
