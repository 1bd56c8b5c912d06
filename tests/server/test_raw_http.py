"""Requests as no client library sends them: odd targets, heads, encodings and numbers."""

from __future__ import annotations

import gzip
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

from phimlx.server.http import MAX_FIELDS, MAX_TEXT
from tests.server.running import SECONDS, Running

CHAT = "/v1/chat/completions"
BODY = {"model": "nano", "messages": [{"role": "user", "content": "2+2"}], "max_tokens": 2}


def exchange(server: Running, line: str, *fields: str, body: bytes = b"") -> tuple[int, Any]:
    """Send a request, written out; return the status and the JSON that comes back."""
    head = [line, "Host: localhost", "Connection: close", f"Content-Length: {len(body)}", *fields]
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), SECONDS) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode("latin-1") + body)
        answer = b""
        while more := connection.recv(1 << 16):
            answer += more
    about, _, content = answer.partition(b"\r\n\r\n")
    return int(about.split()[1]), json.loads(content)


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("OPTIONS * HTTP/1.1", 404, "There is nothing at *."),
        ("GET http://localhost/health HTTP/1.1", 404, "There is nothing at http://localhost/he"),
        ("CONNECT example.com:443 HTTP/1.1", 404, "There is nothing at example.com:443."),
        ("GET health HTTP/1.1", 404, "There is nothing at health."),
        ("POST /chat/completions HTTP/1.1", 404, "There is nothing at /chat/completions. OpenAI's"),
        ("GET /v1/v1/models HTTP/1.1", 404, "There is nothing at /v1/v1/models. OpenAI's API is"),
        (f"GET {CHAT} HTTP/1.1", 405, "Only POST requests are answered here."),
        ("BREW /v1/models HTTP/1.1", 405, "Only GET, HEAD requests are answered here."),
        (f"GET /ui/conversations/{'9' * 5000} HTTP/1.1", 414, "The path has more than 2000 letter"),
        ("GET /v1/models/%ff%00 HTTP/1.1", 404, "There is no model \N{REPLACEMENT CHARACTER}\0"),
    ],
)
def test_what_is_asked_for_nowhere(server: Running, line: str, status: int, message: str) -> None:
    found, answer = exchange(server, line)
    assert found == status
    assert answer["error"]["message"].startswith(message)


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "://", "\xff", ""])
def test_origins_that_are_none(server: Running, origin: str) -> None:
    status, answer = exchange(server, "GET /v1/models HTTP/1.1", f"Origin: {origin}")
    assert (status, answer["error"]["code"]) == (403, "origin_not_allowed")


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/api/chat"])
def test_a_compressed_body_is_told_to_come_plain(server: Running, path: str) -> None:
    packed = gzip.compress(json.dumps(BODY).encode())
    status, answer = exchange(
        server, f"POST {path} HTTP/1.1", "Content-Encoding: gzip", body=packed
    )
    assert status == 415
    assert "Content-Encoding" in json.dumps(answer)
    plain = json.dumps({**BODY, "stream": False}).encode()
    assert exchange(
        server, f"POST {path} HTTP/1.1", "Content-Encoding: identity", body=plain
    )[0] == 200  # fmt: skip


def test_a_form_that_is_none_is_not_read(server: Running) -> None:
    line = "POST /v1/audio/transcriptions HTTP/1.1"
    kind = "Content-Type: application/x-www-form-urlencoded"
    status, answer = exchange(server, line, kind, body=b"model=nano&" * 100)
    assert (status, answer["error"]["param"]) == (400, "file")
    assert "multipart/form-data" in answer["error"]["message"]


@pytest.mark.parametrize("value", [10**400, -(10**400), "1h" * 100_000, "9" * 400 + "h"])
def test_times_beyond_all_bounds(server: Running, value: Any) -> None:
    body = {"model": "nano", "messages": [], "keep_alive": value}
    answer = server.post("/api/chat", body)
    assert answer.status_code == (400 if isinstance(value, str) else 200)
    assert server.post("/api/chat", {**body, "keep_alive": "5m"}).status_code == 200


def test_a_long_body_is_not_read_to_objects(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = b'{"metadata": [' + b"{}," * (MAX_TEXT // 3) + b"{}]}"
    with monkeypatch.context() as patch:
        patch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was read"))
        answer = server.client.post(CHAT, content=long)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


@pytest.mark.parametrize("path", ["", "metadata", "stream_options"])
def test_an_object_has_not_any_number_of_fields(server: Running, path: str) -> None:
    many: dict[str, Any] = {f"field {number}": "1" for number in range(MAX_FIELDS)}
    answer = server.post(CHAT, {**BODY, **({path: many} if path else many)})
    assert answer.status_code == 400
    assert len(answer.text) < 300


def test_halves_of_characters_are_kept_and_told(
    server: Running, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHIMLX_DATA_DIR", str(tmp_path))
    said = [{"role": "user", "content": "\ud800"}]
    body = json.dumps({"model": "nano", "system": "\udfff", "messages": said})
    kept = server.client.post("/ui/conversations", content=body)
    assert kept.status_code == 200
    found = server.client.get(f"/ui/conversations/{kept.json()['id']}")
    assert found.json()["messages"][0]["content"] == "\ud800"
    server.app.token = "a token"
    refused = server.client.post("/ui/session", content=json.dumps({"token": "\ud800"}))
    assert refused.status_code == 403
