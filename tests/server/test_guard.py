"""Who may ask, how much, and how long; and what becomes of a request whose client has gone."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from phimlx.errors import SettingsError
from phimlx.machine.memory import cache_bytes
from phimlx.server import guard, protocol, run
from phimlx.server.run import find_key
from phimlx.server.settings import ServerSettings
from tests.server.running import SECONDS, Running, running

PATH = "/v1/chat/completions"
KEY = "a key"


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "nano", "messages": [{"role": "user", "content": "2+2"}], **more}


def wait_until(true: Callable[[], bool]) -> None:
    """Return when something has become true; fail where it does not."""
    ends = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < ends
        threading.Event().wait(0.005)


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    """A server with a key, for pages of one origin, known under another name too."""
    with running(KEY, cors=("https://app.example",), allowed_hosts=("mac.local",)) as started:
        yield started


@pytest.fixture
def authorized() -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": KEY}, 401),
        ({"authorization": "Basic YSBrZXk="}, 401),
        ({"authorization": f"bearer {KEY}"}, 200),
        ({"x-api-key": KEY}, 200),
        ({"x-api-key": "ä"}, 401),
    ],
)
def test_a_key_is_asked_for(locked: Running, headers: dict[str, str], status: int) -> None:
    raw = {name: value.encode() for name, value in headers.items()}
    answer = locked.client.get("/v1/models", headers=raw)
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert locked.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200),
        ("localhost", 200),
        ("[::1]:80", 200),
        ("mac.local:99", 200),
        ("MAC.LOCAL", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("192.168.1.7", 403),
        ("localhost@evil.example", 403),
        ("", 403),
        ("a b", 403),
    ],
)
def test_other_names_are_not_answered(
    locked: Running, authorized: dict[str, str], host: str, status: int
) -> None:
    answer = locked.client.get("/v1/models", headers={**authorized, "host": host})
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://app.example", 200),
        ("{own}", 200),
        ("http://app.example", 403),
        ("https://app.example.evil.example", 403),
        ("http://127.0.0.1:1", 403),
        ("null", 403),
    ],
)
def test_pages_of_other_sites_are_not_answered(
    locked: Running, authorized: dict[str, str], origin: str, status: int
) -> None:
    origin = origin.replace("{own}", locked.url)
    answer = locked.client.get("/v1/models", headers={**authorized, "origin": origin})
    assert answer.status_code == status
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (origin if origin == "https://app.example" else None)


def test_a_preflight_is_answered_for_listed_origins(locked: Running) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    listed = locked.client.options(PATH, headers={**asked, "origin": "https://app.example"})
    assert listed.status_code == 204
    assert listed.headers["access-control-allow-headers"] == "x-api-key"
    assert locked.client.options(PATH, headers=asked).status_code == 403


def test_listening_beyond_this_machine_needs_a_key(tmp_path: Any) -> None:
    path = tmp_path / "key"
    path.write_text("from a file\n")
    open_to_all = {"host": "0.0.0.0"}
    with pytest.raises(SettingsError, match=r"At 0\.0\.0\.0 anyone on the network could ask\."):
        find_key(ServerSettings(**open_to_all), None)
    assert find_key(ServerSettings(**open_to_all, no_auth=True), None) is None
    assert find_key(ServerSettings(**open_to_all), "from the environment") == "from the environment"
    assert find_key(ServerSettings(**open_to_all, api_key_file=str(path)), "x") == "from a file"
    path.write_text("\n")
    with pytest.raises(SettingsError, match="holds no key"):
        find_key(ServerSettings(api_key_file=str(path)), None)


def exchange(server: Running, data: bytes) -> bytes:
    """Send bytes and read until the server closes the connection."""
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), SECONDS) as connection:
        connection.sendall(data)
        answer = b""
        while more := connection.recv(1 << 16):
            answer += more
        return answer


def test_a_body_that_is_too_large_is_not_read(server: Running) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    answer = exchange(server, f"{head}Content-Length: 99999999999\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_large"


def test_slow_heads_and_bodies_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    with running() as server:
        assert exchange(server, b"") == b""
        assert exchange(server, b"GET /health HTTP/1.1\r\nHost: loc") == b""
        begun = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{{".encode()
        assert exchange(server, begun).startswith(b"HTTP/1.1 408 ")
        assert server.post(PATH, ask(max_tokens=2)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_row(stream: bool) -> None:
    with running() as server:
        where = urlsplit(server.url)
        body = json.dumps(ask(max_tokens=900, stream=stream, temperature=1.5, seed=1)).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = socket.create_connection((where.hostname, where.port), SECONDS)
        with closing(connection):
            connection.sendall(head.encode() + body)
            wait_until(lambda: server.app.service.running == 1)
        wait_until(lambda: server.app.service.running == 0)
        assert server.client.get("/health").json()["running"] == 0


def test_too_many_requests_are_told_when_to_come_again(server: Running) -> None:
    service = server.app.service
    service.running += 1000
    try:
        answer = server.post(PATH, ask())
    finally:
        service.running -= 1000
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_a_server_that_stops_takes_nothing_more() -> None:
    with running() as server:
        server.app.service.draining = True
        assert server.post(PATH, ask()).status_code == 503
        assert server.client.get("/health").json()["status"] == "stopping"


def test_a_request_that_takes_too_long_is_ended() -> None:
    with running(request_seconds=0.001) as server:
        answer = server.post(PATH, ask(max_tokens=1000, temperature=1.5, seed=1))
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert server.app.service.running == 0


def test_a_failing_step_ends_its_requests_alone(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.post(PATH, ask(max_tokens=2)).status_code == 200
    [loaded] = [each for each in server.app.service.models.loaded if each.served.name == "nano"]
    with monkeypatch.context() as patch:
        patch.setattr(loaded.phi.engine, "step", lambda: 1 / 0)
        answer = server.post(PATH, ask(max_tokens=2))
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert "ZeroDivision" not in answer.text
    assert error["code"] == "internal_error"
    assert server.post(PATH, ask(max_tokens=2)).status_code == 200


def test_metrics_count(server: Running) -> None:
    server.post(PATH, ask(max_tokens=2))
    text = server.client.get("/metrics").text
    assert 'phimlx_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert 'phimlx_tokens_total{kind="generated",model="nano"}' in text
    assert server.client.get("/nowhere/at/all").status_code == 404
    assert "nowhere" not in server.client.get("/metrics").text


def test_the_log_has_no_words_unless_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for logs in (False, True):
        caplog.clear()
        with running(log_prompts=logs) as server, caplog.at_level(logging.INFO, "phimlx"):
            assert server.post(PATH, ask(max_tokens=4, temperature=0)).status_code == 200
            assert server.client.get("/a%0ab?secret").status_code == 404
        lines = [record.getMessage() for record in caplog.records]
        access = [line for line in lines if line.startswith("request=")]
        assert re.fullmatch(
            rf"request=req_\w+ method=POST path={PATH} status=200 seconds=\d+\.\d{{3}}", access[0]
        )
        assert " method=GET path=/a%0ab status=404 " in access[1]
        words = [json.loads(line.partition(" words=")[2]) for line in lines if " words=" in line]
        assert any("2+2" in line for line in lines) is logs
        assert len(words) == logs
        assert all("2+2" in each["prompt"] and each["reply"] for each in words)


def test_what_is_kept_of_earlier_requests_has_a_limit() -> None:
    with running(model="nano", prefix_tokens=300) as server:
        for number in range(12):
            text = f"{number} " * 40
            body = ask(max_tokens=2) | {"messages": [{"role": "user", "content": text}]}
            assert server.post(PATH, body).status_code == 200
            [loaded] = server.app.service.models.loaded
            limit = cache_bytes(loaded.phi.model.config, 300)
            assert 0 < loaded.phi.engine.prefix_bytes <= limit
        assert loaded.phi.engine.prefix_bytes > limit // 2


def test_connections_that_say_nothing_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CONNECTIONS", 10)
    with running() as server, ExitStack() as held:
        where = urlsplit(server.url)
        for data in (b"", b"GET / HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            for _ in range(20):
                opened = socket.create_connection((where.hostname, where.port), SECONDS)
                held.enter_context(closing(opened)).sendall(data)
            assert httpx2.get(f"{server.url}/health", timeout=SECONDS).status_code == 200
