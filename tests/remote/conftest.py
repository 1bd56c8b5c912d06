"""The server of the tests of the server, and notes of its own for each test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phimlx.remote.client import Client
from phimlx.remote.notes import Note
from phimlx.remote.phi import RemotePhi
from tests.server.conftest import nano, say, server  # noqa: F401
from tests.server.running import Running


@pytest.fixture
def remote(server: Running) -> RemotePhi:  # noqa: F811
    return RemotePhi.connect(Client(server.url), "nano")


@pytest.fixture
def note(
    server: Running,  # noqa: F811
    remote: RemotePhi,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Note:
    """What the server wrote down of itself; nano is loaded there."""
    monkeypatch.setenv("PHIMLX_RUNTIME_DIR", str(tmp_path / "run"))
    made = Note(server.url, os.getpid(), server.app.secret)
    made.write()
    return made
