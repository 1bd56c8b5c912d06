"""A Hub on this machine: as much of its protocol as one download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What it holds, what it was asked for, and how it fails.

    Attributes:
        repos: file contents by repository and name.
        refusals: status and headers to answer with, by repository.
        requested: paths of files that were fetched.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    requested: list[str] = field(default_factory=list)
    url: str = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            if path.startswith("api/models/"):
                owner, name, *rest = path.removeprefix("api/models/").split("/")
                self._api(f"{owner}/{name}", rest)
            else:
                owner, name, _, _, file = path.split("/", 4)
                self._file(f"{owner}/{name}", file)

        do_HEAD = do_GET

        def _api(self, repo: str, rest: list[str]) -> None:
            if repo in hub.refusals:
                status, headers = hub.refusals[repo]
                self._answer(status, b"{}", headers)
            elif repo not in hub.repos:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif rest[:1] == ["revision"] and rest[1] not in ("main", "v1", COMMIT):
                self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif rest[:1] == ["tree"]:
                files = [
                    {"type": "file", "path": name, "size": len(content), "oid": self._etag(content)}
                    for name, content in hub.repos[repo].items()
                ]
                self._answer(200, json.dumps(files).encode())
            else:
                siblings = [
                    {"rfilename": name, "size": len(content)}
                    for name, content in hub.repos[repo].items()
                ]
                info = {"id": repo, "sha": COMMIT, "siblings": siblings}
                self._answer(200, json.dumps(info).encode())

        def _file(self, repo: str, name: str) -> None:
            content = hub.repos[repo][name]
            if self.command == "GET":
                hub.requested.append(name)
            headers = {"ETag": f'"{self._etag(content)}"', "X-Repo-Commit": COMMIT}
            self._answer(200, content, headers)

        @staticmethod
        def _etag(content: bytes) -> str:
            return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    return Handler


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub that answers while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
