"""The Hub of `tests.hub.loopback_hub` with a desk that takes uploads, and faults on demand.

It speaks what huggingface_hub speaks without Xet: whoami, create, preupload, LFS batch, commit.
"""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from tests.hub.loopback_hub import Fault, Hub, git_hash, handler, serve_alone

ACCOUNT: dict[str, Any] = {
    "type": "user",
    "name": "me",
    "orgs": [{"name": "Us", "roleInOrg": "write"}, {"name": "them", "roleInOrg": "read"}],
    "auth": {"type": "access_token", "accessToken": {"displayName": "x", "role": "write"}},
}


@dataclass
class Desk:
    """What was uploaded, and what goes wrong.

    Attributes:
        account: what the Hub knows of the token's owner.
        faults: by what is asked ("whoami-v2", "auth-check", "create", "validate-yaml", "preupload",
            "batch", "put", "commit"), one for each time; status and headers, or `cut` for a
            connection that is dropped after so many bytes of the request (without an answer).
        asked: these, in order.
        stored: large files by SHA-256.
        commits: message and changes of each; a change is a name with its contents, or with None.
        tokens: that came along.
    """

    hub: Hub
    account: Any = field(default_factory=lambda: dict(ACCOUNT))
    faults: defaultdict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    asked: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, dict[str, bytes | None]]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    def create(self, wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        repo = f"{wanted['organization']}/{wanted['name']}"
        if repo in self.hub.repos:
            return 409, {"error": "You already created it", "url": f"{self.hub.url}/{repo}"}
        self.hub.repos[repo] = {}
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.hub.private.add(repo)
        return 200, {"url": f"{self.hub.url}/{repo}"}

    def preupload(self, repo: str, wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        files = []
        for file in wanted["files"]:
            name, large = file["path"], file["path"].endswith((".safetensors", "tokenizer.json"))
            held = self.hub.repos[repo].get(name)
            oid = None if held is None or large else git_hash(held)
            mode = "lfs" if large else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}

    def batch(self, wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        objects = []
        for entry in wanted["objects"]:
            missing = entry["oid"] not in self.stored
            upload = {"upload": {"href": f"{self.hub.cdn}/put/{entry['oid']}"}}
            objects.append({**entry, **({"actions": upload} if missing else {})})
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        changes: dict[str, bytes | None] = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.stored[value["oid"]]
            else:
                changes[value["path"]] = None
        held = self.hub.repos[repo] | changes
        self.hub.repos[repo] = {name: data for name, data in held.items() if data is not None}
        self.commits.append((lines[0]["value"]["summary"], changes))
        commit = f"{len(self.commits):040x}"
        return 200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit}


def _taking(desk: list[Desk], hub: Hub, place: str) -> type[BaseHTTPRequestHandler]:
    if not desk:
        desk.append(Desk(hub))
    (taker,) = desk

    class Taking(handler(hub, place)):  # type: ignore[misc]
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path == "/api/whoami-v2":
                self._take("whoami-v2", lambda body: (200, taker.account))
            elif path.endswith("/auth-check/write"):
                self._take("auth-check", lambda body: (200, {}))
            else:
                super().do_GET()

        def do_PUT(self) -> None:
            def store(body: bytes) -> tuple[int, dict[str, Any]]:
                taker.stored[self.path.rpartition("/")[2]] = body
                return 200, {}

            self._take("put", store)

        def do_POST(self) -> None:
            match unquote(urlsplit(self.path).path).strip("/").split("/"):
                case ["api", "repos", "create"]:
                    self._take("create", lambda body: taker.create(json.loads(body)))
                case ["api", "validate-yaml"]:
                    self._take("validate-yaml", lambda body: (200, {}))
                case ["api", "models", owner, name, "preupload", _]:
                    repo = f"{owner}/{name}"
                    self._take("preupload", lambda body: taker.preupload(repo, json.loads(body)))
                case ["api", "models", owner, name, "commit", _]:
                    repo = f"{owner}/{name}"
                    self._take(
                        "commit",
                        lambda body: taker.commit(repo, [*map(json.loads, body.splitlines())]),
                    )
                case [*_, "batch"]:
                    self._take("batch", lambda body: taker.batch(json.loads(body)))

        def _take(self, what: str, answer: Any) -> None:
            taker.asked.append(what)
            if place == "hub":
                taker.tokens.add(self.headers.get("Authorization"))
            fault = taker.faults[what].pop(0) if taker.faults[what] else Fault()
            if fault.cut is not None:
                self.rfile.read(fault.cut)
                self.close_connection = True
                self.connection.close()
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if fault.status is not None:
                status, reply, headers = fault.status, {"error": "no"}, fault.headers
            else:
                (status, reply), headers = answer(body), {}
            data = json.dumps(reply).encode()
            self._begin(status, {**headers, "Content-Type": "application/json"}, len(data))
            self.wfile.write(data)

    return Taking


@contextmanager
def serve_desk(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Desk]:
    """A Hub that takes uploads, as the one that huggingface_hub knows; no retry waits."""
    desks: list[Desk] = []
    with serve_alone(monkeypatch, cache, lambda hub, place: _taking(desks, hub, place)):
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield desks[0]
