"""Pictures by their address: not fetched unless that is said, and then from public ones alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.server.running import Running, running

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


@pytest.mark.parametrize("url", ["https://example.com/a.png", "/etc/passwd", "file:///etc/passwd"])
def test_ollamas_pictures_have_no_addresses(fetching: Running, url: str) -> None:
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "What?", "images": [url]}]}
    bodies = {"/api/chat": chat, "/api/generate": {"prompt": "What?", "images": [url]}}
    for path, body in bodies.items():
        answer = fetching.post(path, {"model": MODEL, **body})
        assert answer.status_code == 400, answer.text
        assert isinstance(answer.json()["error"], str)
