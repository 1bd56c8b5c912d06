"""A Hub on this machine: its protocol as far as downloads go, and faults on demand.

One server is the Hub, a second the host that it redirects large files to. Files whose names end
in .safetensors are kept as Git LFS keeps them (SHA-256), all others as git does (blob SHA-1).
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from huggingface_hub import constants

if TYPE_CHECKING:
    import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Fault:
    """What goes wrong with one answer that should have held bytes of a file.

    Attributes:
        status: answer with this instead, and with `headers`.
        cut: close the connection after so many bytes of the answer.
        wrong: turn every byte into another one.
        longer: send so many bytes more (or fewer), with a Content-Length that says so.
        whole: ignore the Range asked for.
        elsewhere: answer a Range with bytes that begin so many later.
        piece: send pieces of so many bytes, each on its own.
        hold: send so many bytes, then wait until the Hub is released.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    wrong: bool = False
    longer: int = 0
    whole: bool = False
    elsewhere: int = 0
    piece: int | None = None
    hold: int | None = None


@dataclass
class Hub:
    """What it holds, what it was asked for, and how it fails.

    Attributes:
        repos: file contents by repository and name.
        refusals: status and headers to answer with, by repository.
        busy: the same, each for one question about a repository.
        moved: new names of repositories, by the old ones.
        faults: by file, one for each time that its bytes are asked for.
        listed: replaces entries of what the Hub says of files, by repository and name.
        requested: names of the files that were fetched.
        ranges: first byte asked for, by file, one for each time.
        served: bytes of file contents that went out, by file.
        authorizations: the header of that name, by server and path.
        private: repositories that only their owner sees.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    busy: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    listed: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    requested: list[str] = field(default_factory=list)
    ranges: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    served: Counter[str] = field(default_factory=Counter)
    authorizations: dict[str, str | None] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    release: threading.Event = field(default_factory=threading.Event)
    commit: str = COMMIT
    url: str = ""
    cdn: str = ""

    def describe(self, repo: str) -> dict[str, Any]:
        """What the Hub says of a repository when asked for its files' sizes and hashes."""
        siblings = []
        for name, content in self.repos[repo].items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
                entry["blobId"] = git_hash(digest.encode())
            else:
                entry["blobId"] = git_hash(content)
            siblings.append({**entry, **self.listed.get((repo, name), {})})
        private = repo in self.private
        return {"id": repo, "sha": self.commit, "private": private, "siblings": siblings}

    def tree(self, repo: str) -> list[dict[str, Any]]:
        """The same as huggingface_hub's own downloads ask for it."""
        entries = []
        for file in self.describe(repo)["siblings"]:
            entry = {
                "type": "file",
                "path": file["rfilename"],
                "size": file["size"],
                "oid": file["blobId"],
            }
            if "lfs" in file:
                lfs = file["lfs"]
                entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 130}
            entries.append(entry)
        return entries


def git_hash(content: bytes) -> str:
    """The name that git gives to a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def handler(hub: Hub, place: str) -> type[BaseHTTPRequestHandler]:
    """How one of the two servers answers: "hub" or "cdn"."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or every body waits 40 ms for its headers' receipt

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).lstrip("/")
            hub.authorizations[f"{place}/{path}"] = self.headers.get("Authorization")
            if place == "cdn":
                repo, name = path.split("/at/", 1)
                self._bytes(repo, name, {"ETag": '"of the storage"'})
            elif path.startswith("api/models/"):
                owner, name, *rest = path.removeprefix("api/models/").split("/")
                self._api(f"{owner}/{name}", rest)
            elif path.startswith("api/resolve-cache/models/"):
                _, _, _, owner, name, _, file = path.split("/", 6)
                self._bytes(
                    f"{owner}/{name}",
                    file,
                    {
                        "X-Repo-Commit": hub.commit,
                        "ETag": f'"{git_hash(hub.repos[f"{owner}/{name}"][file])}"',
                    },
                )
            elif path.count("/") >= 4:
                owner, name, _, revision, file = path.split("/", 4)
                self._resolve(f"{owner}/{name}", revision, file)
            else:
                self._answer(404, b"{}")

        do_HEAD = do_GET

        def _api(self, repo: str, rest: list[str]) -> None:
            if hub.busy.get(repo):
                status, headers = hub.busy[repo].pop(0)
                self._answer(status, b"{}", headers)
            elif repo in hub.refusals:
                status, headers = hub.refusals[repo]
                self._answer(status, b"{}", headers)
            elif repo in hub.moved:
                tail = "".join(f"/{part}" for part in rest)
                query = urlsplit(self.path).query
                location = f"/api/models/{hub.moved[repo]}{tail}?{query}"
                self._answer(307, b"", {"Location": location})
            elif repo not in hub.repos:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif rest[:1] == ["revision"] and rest[1] not in ("main", "v1", hub.commit):
                self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif rest[:1] == ["tree"]:
                self._answer(200, json.dumps(hub.tree(repo)).encode())
            else:
                self._answer(200, json.dumps(hub.describe(repo)).encode())

        def _resolve(self, repo: str, revision: str, name: str) -> None:
            if repo in hub.moved:
                location = f"/{hub.moved[repo]}/resolve/{revision}/{quote(name)}"
                self._answer(307, b"", {"Location": location})
                return
            if name not in hub.repos.get(repo, {}):
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            fault = (hub.faults.get(name) or [Fault()])[0]
            if fault.status is not None:
                hub.faults[name].pop(0)
                self._answer(fault.status, b"", fault.headers)
                return
            content = hub.repos[repo][name]
            headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{git_hash(content)}"'}
            if name.endswith(".safetensors"):
                headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
                headers["X-Linked-Size"] = str(len(content))
                headers["Location"] = f"{hub.cdn}/{repo}/at/{quote(name)}?signature=x"
            else:
                tail = f"{repo}/{revision}/{quote(name)}"
                headers["Location"] = f"/api/resolve-cache/models/{tail}"
            self._answer(302, b"", headers)

        def _bytes(self, repo: str, name: str, headers: dict[str, str]) -> None:
            content = hub.repos[repo][name]
            if self.command == "HEAD":
                self._begin(200, headers, len(content))
                return
            faults = hub.faults.get(name)
            fault = faults.pop(0) if faults else Fault()
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            start = int(asked[1]) if asked else 0
            stop = int(asked[2]) + 1 if asked and asked[2] else len(content)
            hub.requested.append(name)
            hub.ranges[name].append(start)
            if asked is not None and start >= len(content):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            status = 200
            if asked is not None and not fault.whole:
                status, start = 206, start + fault.elsewhere
                content = content[start:stop]
                headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/*"
            if fault.wrong:
                content = bytes(byte ^ 255 for byte in content)
            if fault.longer < 0:
                content = content[: fault.longer]
            content += bytes(max(fault.longer, 0))
            self._send(status, headers, content, fault, name)

        def _send(
            self, status: int, headers: dict[str, str], content: bytes, fault: Fault, name: str
        ) -> None:
            self._begin(status, headers, len(content))
            sent = len(content) if fault.cut is None else min(fault.cut, len(content))
            if fault.hold is not None:
                sent = fault.hold
            step = fault.piece or 65536
            try:
                for first in range(0, sent, step):
                    piece = content[first : min(first + step, sent)]
                    hub.served[name] += len(piece)  # first: a client is quick to look
                    self.wfile.write(piece)
                    self.wfile.flush()
                if fault.hold is not None:
                    hub.release.wait(30)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            if sent < len(content):
                self.close_connection = True

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self._begin(status, headers or {}, len(body))
            if self.command == "GET":
                self.wfile.write(body)

        def _begin(self, status: int, headers: dict[str, str], length: int) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(length)}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    return Handler


Handlers = Callable[[Hub, str], type[BaseHTTPRequestHandler]]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that hangs up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serve(handler: Handlers = handler) -> Iterator[Hub]:
    """A Hub that answers while the block runs."""
    hub = Hub()
    servers = [_Server(("127.0.0.1", 0), handler(hub, place)) for place in ("hub", "cdn")]
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        for server in servers
    ]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


@contextmanager
def serve_alone(
    monkeypatch: pytest.MonkeyPatch, cache: Path, handler: Handlers = handler
) -> Iterator[Hub]:
    """The same, as the one Hub that huggingface_hub knows; `cache` is its cache."""
    with serve(handler) as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub
