"""Servers at an address that are none, or lie: each is told in a sentence, and ends at once."""

from __future__ import annotations

import gzip

import pytest

from phimlx.errors import ToolError
from phimlx.tools import http
from phimlx.tools.servers import Servers
from tests.remote.strange import answering

JSON = {"content_type": "application/json"}


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (200, b"<html>Log in</html>", {"content_type": "text/html"}),
        (200, b"{", JSON),
        (200, b"data: {\n\n", {"content_type": "text/event-stream"}),
        (200, gzip.compress(b"{}", mtime=0), {**JSON, "content_encoding": "gzip"}),
        (200, b" " * 200_000, JSON),
        (401, b"", {}),
        (404, b"", {}),
        (500, b"", {}),
        (307, b"", {"location": "http://example.com/mcp"}),
    ],
)
def test_a_server_that_is_none(
    status: int, body: bytes, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "MAX_BYTES", 100_000)
    monkeypatch.setattr("phimlx.tools.server.START_SECONDS", 5.0)
    servers = Servers()
    try:
        with answering(status, body, **headers) as url:
            (server,) = servers.add([f"{url}/mcp"])
            with pytest.raises(ToolError) as caught:
                servers.start(server, lambda note: None)
    finally:
        servers.close()
    said = str(caught.value)
    assert said.startswith("The MCP server 127.0.0.1 is not there: ")
    assert said.isprintable()
    assert len(said) < 400
    assert "did not answer within" not in said
    assert ("may say who asks" in said) == (status == 401)


def test_headers_go_along() -> None:
    headers = http.http_client({"Authorization": "Bearer mine", "Accept-Encoding": "gzip"}).headers
    assert headers["authorization"] == "Bearer mine"
    assert headers.get_list("accept-encoding") == ["identity"]
