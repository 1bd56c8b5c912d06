"""Pictures by their address: not fetched unless that is said, and then from public ones alone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from phimlx.api import load
from phimlx.hub.resolve import NANO_MULTIMODAL
from phimlx.media import fetch
from tests.certificate import CERTIFICATE, KEY, serving
from tests.server.running import SECONDS, Running, running

MODEL = "nano-multimodal"
Body = Callable[[str], dict[str, Any]]


def said(part: dict[str, Any], name: str = "messages") -> dict[str, Any]:
    return {name: [{"role": "user", "content": [part]}]}


DIALECTS: dict[str, Body] = {
    "/v1/chat/completions": lambda url: said({"type": "image_url", "image_url": {"url": url}}),
    "/v1/responses": lambda url: said({"type": "input_image", "image_url": url}, "input"),
    "/v1/messages": lambda url: {
        **said({"type": "image", "source": {"type": "url", "url": url}}), "max_tokens": 4,
    },
}  # fmt: skip
PRIVATE = [
    "https://127.0.0.1/a.png",
    "https://[::1]/a.png",
    "https://10.0.0.1/a.png",
    "https://169.254.169.254/latest/meta-data",
    "https://[::ffff:127.0.0.1]/a.png",
    "https://0/a.png",
    "http://example.com/a.png",
    "file:///etc/passwd",
    "/etc/passwd",
]


PICTURE = (NANO_MULTIMODAL / "pictures" / "vision-00.png").read_bytes()


class Pictures(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []
    wanted: ClassVar[threading.Event]
    released: ClassVar[threading.Event]

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/silent":
            if self.asked.count(self.path) == len(DIALECTS):
                self.wanted.set()
            assert self.released.wait(SECONDS)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(PICTURE)))
        self.end_headers()
        self.wfile.write(PICTURE)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A site with a picture, by https and a name; it is here, though taken to be elsewhere."""
    trusted = tmp_path / "certificate.pem"
    trusted.write_text(CERTIFICATE + KEY)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    monkeypatch.setattr(Pictures, "asked", [])
    monkeypatch.setattr(Pictures, "wanted", threading.Event(), raising=False)
    monkeypatch.setattr(Pictures, "released", threading.Event(), raising=False)
    lookup, check = socket.getaddrinfo, fetch._check_public

    def here(host: str, *rest: Any, **more: Any) -> Any:
        return lookup("127.0.0.7" if host == "pictures.example" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", here)
    monkeypatch.setattr(
        fetch,
        "_check_public",
        lambda place, url: None if place == "127.0.0.7" else check(place, url),
    )
    with serving(ThreadingHTTPServer(("127.0.0.7", 0), Pictures), trusted) as port:
        yield f"https://pictures.example:{port}/a.png"


@pytest.fixture(scope="module")
def fetching() -> Iterator[Running]:
    with running(model=MODEL, fetch_media=True, no_cache=True) as started:
        yield started


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("url", ["https://example.com/a.png", *PRIVATE[:1], *PRIVATE[-2:]])
def test_nothing_is_fetched_by_default(server: Running, path: str, url: str) -> None:
    answer = server.post(path, {"model": MODEL, **DIALECTS[path](url)})
    assert answer.status_code == 400, answer.text
    assert "error" in answer.json()


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("url", PRIVATE)
def test_nothing_is_fetched_from_here(fetching: Running, path: str, url: str) -> None:
    answer = fetching.post(path, {"model": MODEL, **DIALECTS[path](url)})
    assert answer.status_code == 400, answer.text
    assert "root:" not in answer.text
    assert "name its path" not in answer.text  # which no client can


def spent(answer: Any) -> int:
    """Count the tokens of the prompt."""
    usage = answer.json()["usage"]
    cached: int = usage.get("cache_read_input_tokens", 0)
    return cached + int(usage.get("prompt_tokens", usage.get("input_tokens")))


@pytest.mark.parametrize("path", DIALECTS)
def test_a_picture_is_fetched_where_that_is_said(
    fetching: Running, server: Running, site: str, path: str
) -> None:
    refused = server.post(path, {"model": MODEL, **DIALECTS[path](site)})
    assert refused.status_code == 400, refused.text
    assert "is a URL, and URLs are switched off" in refused.text
    assert Pictures.asked == []
    limit = {"max_output_tokens" if path.endswith("responses") else "max_tokens": 4}
    answer = fetching.post(path, {"model": MODEL, **DIALECTS[path](site), **limit})
    assert answer.status_code == 200, answer.text
    assert Pictures.asked == ["/a.png"]
    sent = [{"role": "user", "content": [{"type": "image", "image": PICTURE}]}]
    assert spent(answer) == len(load(MODEL).encode(sent))


def test_nobody_waits_for_pictures_of_others(fetching: Running, site: str) -> None:
    silent = site.replace("a.png", "silent")
    asked = [DIALECTS[path](silent) for path in DIALECTS]
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = [threads.submit(fetching.post, path, {"model": MODEL, **body})
                   for path, body in zip(DIALECTS, asked, strict=True)]  # fmt: skip
        assert Pictures.wanted.wait(SECONDS)
        text = {"model": MODEL, "prompt": "2+2", "max_tokens": 2}
        assert fetching.post("/v1/completions", text).status_code == 200
        assert not any(each.done() for each in answers)
        Pictures.released.set()
        assert [each.result(SECONDS).status_code for each in answers] == [400] * len(asked)


@pytest.mark.parametrize("url", ["https://example.com/a.png", "/etc/passwd", "file:///etc/passwd"])
def test_ollamas_pictures_have_no_addresses(fetching: Running, url: str) -> None:
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "What?", "images": [url]}]}
    bodies = {"/api/chat": chat, "/api/generate": {"prompt": "What?", "images": [url]}}
    for path, body in bodies.items():
        answer = fetching.post(path, {"model": MODEL, **body})
        assert answer.status_code == 400, answer.text
        assert isinstance(answer.json()["error"], str)
