"""The Hub on this machine, holding data sets instead of models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.hub import loopback_hub
from tests.hub.loopback_hub import Hub


def handler(hub: Hub, place: str) -> type[BaseHTTPRequestHandler]:
    """Answers for data sets as the Hub for models does; for models there is no answer."""
    base = loopback_hub.handler(hub, place)

    class Handler(base):  # type: ignore[misc, valid-type]
        path: str

        def do_GET(self) -> None:
            asked = urlsplit(self.path).path
            hub.authorizations[place + asked] = self.headers.get("Authorization")
            if asked.startswith("/api/models/"):
                self.path = "/api/models/no/models"
            self.path = self.path.replace("/api/datasets/", "/api/models/", 1)
            self.path = self.path.removeprefix("/datasets")
            super().do_GET()

        do_HEAD = do_GET

    return Handler


@contextmanager
def serve_datasets(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A Hub that huggingface_hub takes for the only one; `cache` is its cache."""
    with loopback_hub.serve_alone(monkeypatch, cache, handler) as hub:
        yield hub
