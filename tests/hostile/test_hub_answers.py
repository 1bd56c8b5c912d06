"""What a Hub may say of a repository: each ends soon, in little memory, and with one sentence."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from phimlx.errors import PhimlxError
from phimlx.hub import client, download
from phimlx.hub.client import Remote
from tests.hostile.values import VALUES, put
from tests.hub.loopback_hub import COMMIT, Hub, handler, serve_alone

REPO = "someone/tune"
LONGEST = 500  # characters of what a failure says
ENTRY = {"rfilename": "config.json", "size": 2, "blobId": "0" * 40}
LARGE = {"rfilename": "a.safetensors", "lfs": {"sha256": "0" * 64, "size": 3}, "size": 3}
ANSWER: dict[str, Any] = {"id": REPO, "sha": COMMIT, "siblings": [ENTRY, LARGE]}


@dataclass
class Said:
    """How the Hub answers.

    Attributes:
        body: all of it, or what is repeated without end.
        pause: seconds between the repetitions.
    """

    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    endless: bool = False
    pause: float = 0


SAID = Said()


def saying(hub: Hub, place: str) -> type[BaseHTTPRequestHandler]:
    """Answer every question about a repository by `SAID`."""
    usual: Any = handler(hub, place)

    class Handler(usual):  # type: ignore[misc]
        def do_GET(self) -> None:
            if not self.path.startswith("/api/models/"):
                super().do_GET()
                return
            self.send_response(SAID.status)
            for name, value in SAID.headers.items():
                self.send_header(name, value)
            if SAID.endless:
                self.close_connection = True
            else:
                self.send_header("Content-Length", str(len(SAID.body)))
            self.end_headers()
            self.wfile.write(SAID.body)
            try:
                while SAID.endless and not hub.release.wait(SAID.pause):
                    self.wfile.write(SAID.body)
            except OSError:  # the client has hung up
                pass

    return Handler


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Remote]:
    with serve_alone(monkeypatch, tmp_path / "hub", saying):
        yield Remote(wait=lambda seconds: None)


def says(monkeypatch: pytest.MonkeyPatch, body: bytes | str = b"", **more: Any) -> None:
    data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    for name, value in vars(Said(data, **more)).items():
        monkeypatch.setattr(SAID, name, value)


def met(remote: Remote) -> str | None:
    """Ask, and plan a download; what a failure says."""
    try:
        download.plan_download(remote.repository(REPO), remote, None)
    except PhimlxError as error:
        said = str(error)
        said.encode()
        assert 0 < len(said) < LONGEST, said[:300]
        return said
    return None


@pytest.mark.parametrize("status", [200, 403, 404, 500])
def test_an_answer_without_end(
    monkeypatch: pytest.MonkeyPatch, remote: Remote, status: int
) -> None:
    monkeypatch.setattr(client, "LARGEST_ANSWER", 4 << 20)
    says(monkeypatch, b" " * 65536, endless=True, status=status)
    said = met(remote)
    assert said is not None
    assert ("larger than any" in said) == (status == 200)


@pytest.mark.parametrize("status", [200, 404])
def test_an_answer_that_comes_a_byte_at_a_time(
    monkeypatch: pytest.MonkeyPatch, remote: Remote, status: int
) -> None:
    monkeypatch.setattr(client, "LONGEST_ANSWER", 0.3)
    says(monkeypatch, b" ", endless=True, pause=0.02, status=status)
    began = time.monotonic()
    said = met(remote)
    assert said is not None
    assert ("has not ended after 0.3 s" in said) == (status == 200)
    assert time.monotonic() - began < 20


def test_an_answer_that_unpacks_to_much(monkeypatch: pytest.MonkeyPatch, remote: Remote) -> None:
    monkeypatch.setattr(client, "LARGEST_ANSWER", 4 << 20)
    packed = gzip.compress(bytes(512 << 20), 1)  # 2 MB
    says(monkeypatch, packed, headers={"Content-Encoding": "gzip"})
    tracemalloc.start()
    said = met(remote)
    assert tracemalloc.get_traced_memory()[1] < 256 << 20
    tracemalloc.stop()
    assert said is not None
    assert "larger than any" in said


def test_a_hundred_thousand_files(monkeypatch: pytest.MonkeyPatch, remote: Remote) -> None:
    files = [{**ENTRY, "rfilename": f"data/{i}.json"} for i in range(100_000)]
    says(monkeypatch, json.dumps({**ANSWER, "siblings": [*files, ENTRY, LARGE]}))
    began = time.process_time()
    met(remote)
    assert time.process_time() - began < 10


PATHS: tuple[tuple[Any, ...], ...] = (
    *(("id",), ("sha",), ("siblings",), ("siblings", 0)),
    *(("siblings", 0, key) for key in ("rfilename", "size", "blobId", "lfs")),
    *(("siblings", 1, "lfs", key) for key in ("sha256", "size")),
)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_values_that_no_hub_gives(
    monkeypatch: pytest.MonkeyPatch, remote: Remote, path: tuple[Any, ...]
) -> None:
    for value in VALUES.values():
        says(monkeypatch, put(ANSWER, path, value))
        met(remote)


def test_answers_that_are_something_else(monkeypatch: pytest.MonkeyPatch, remote: Remote) -> None:
    page = "<html>Log in</html>"
    for body in (*VALUES.values(), page, "", '{"id"', b"\xff\xfe", json.dumps(ANSWER) + "x"):
        says(monkeypatch, body)
        assert met(remote) is not None


NAMES = ("\ud800.json", "a\ud800/b", "x" * 300 + ".json", "a/" * 3000 + "b.json", "\x1b]0;x\x07")


@pytest.mark.parametrize("name", NAMES, ids=[ascii(name)[:12] for name in NAMES])
def test_names_that_no_disk_takes(
    monkeypatch: pytest.MonkeyPatch, remote: Remote, name: str
) -> None:
    says(monkeypatch, json.dumps({**ANSWER, "siblings": [{**ENTRY, "rfilename": name}, LARGE]}))
    met(remote)
