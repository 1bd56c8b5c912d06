"""Servers are found by what they wrote down of themselves, and nothing that others could write."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phimlx.api import Phi
from phimlx.hub.content_hash import Contents
from phimlx.hub.resolve import NANO, NANO_MULTIMODAL
from phimlx.remote import notes
from phimlx.remote.notes import Note, find_loaded, read_notes
from tests.remote.strange import answering
from tests.server.adapters import write_adapter
from tests.server.running import Running, running

STAMP = Contents(NANO).stamp


def test_a_server_that_holds_the_model_is_found(note: Note, server: Running) -> None:
    assert stat.S_IMODE(note.path.stat().st_mode) == 0o600
    found = find_loaded(STAMP, None)
    assert found is not None
    assert (found.url, found.name) == (server.url, "nano")


def test_a_stamp_is_of_the_files_alone(nano: Phi, tmp_path: Path) -> None:
    assert nano.stamp() == STAMP
    assert Contents(NANO_MULTIMODAL).stamp != STAMP
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((NANO / name).read_bytes())
    before = Contents(tmp_path)
    assert before.stamp != STAMP
    os.utime(tmp_path / "config.json", ns=(1, 1))
    assert Contents(tmp_path).stamp != before.stamp


def test_another_model_is_not_found(note: Note) -> None:
    assert find_loaded("0" * 64, None) is None
    assert note.path.exists()


def test_there_is_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIMLX_RUNTIME_DIR", str(tmp_path / "none"))
    assert read_notes() == []
    assert find_loaded(STAMP, None) is None


def dead() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait(60)
    return child.pid


@pytest.mark.parametrize(
    "change",
    [
        {"pid": "dead"},
        {"pid": 1.5},
        {"pid": -1},
        {"pid": 10**30},
        {"url": 5},
        {"secret": None},
        {"secret": "\ud800"},
        "[]",
        "{",
        "{" + " " * 5000 + "}",
    ],
)
def test_stale_and_damaged_notes_are_removed(note: Note, change: Any) -> None:
    if change == {"pid": "dead"}:
        change = {"pid": dead()}
    text = change
    if isinstance(change, dict):
        text = json.dumps({"url": note.url, "pid": note.pid, "secret": note.secret} | change)
    note.path.write_text(text)
    assert find_loaded(STAMP, None) is None
    assert not note.path.exists()


def test_a_note_that_others_could_write_is_nobodys(
    note: Note, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode in (0o620, 0o602, 0o644):
        note.path.chmod(mode)
        assert read_notes() == []
    note.path.chmod(0o600)
    assert read_notes() == [note]
    elsewhere = note.path.rename(note.path.parent.parent / "x.json")
    note.path.symlink_to(elsewhere)
    assert read_notes() == []
    note.path.unlink()
    elsewhere.rename(note.path)
    monkeypatch.setattr(os, "getuid", lambda: note.path.stat().st_uid + 1)
    assert read_notes() == []
    assert note.path.exists()


def test_another_program_at_the_address_is_told_nothing(note: Note) -> None:
    replace(note, secret="0" * 64).write()
    note.remove()
    assert find_loaded(STAMP, "key") is None
    for body in (b"{}", b"[]", b'{"proof": 5}', b'{"proof": "\\ud800"}', b"<html>"):
        with answering(200, body) as url:
            replace(note, url=url).write()
            assert find_loaded(STAMP, "key") is None


def test_a_server_that_does_not_answer_is_passed_over(
    note: Note, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "ANSWER_SECONDS", 0.01)
    replace(note, url="http://127.0.0.1:1").write()
    assert find_loaded(STAMP, None) is None


@pytest.mark.parametrize(("key", "is_found"), [("k", True), (None, False), ("other", False)])
def test_a_key_must_be_at_hand(
    key: str | None, is_found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHIMLX_RUNTIME_DIR", str(tmp_path))
    with running("k", model="nano") as server:
        Note(server.url, os.getpid(), server.app.secret).write()
        assert (find_loaded(STAMP, key) is not None) == is_found


def test_a_server_that_shortens_replies_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHIMLX_RUNTIME_DIR", str(tmp_path))
    with running(model="nano", max_tokens=5) as server:
        Note(server.url, os.getpid(), server.app.secret).write()
        assert find_loaded(STAMP, None) is None


def test_an_adapter_is_not_its_base(
    nano: Phi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHIMLX_RUNTIME_DIR", str(tmp_path))
    folder = write_adapter(tmp_path / "a", nano, 1)
    with running(model="nano", adapters=(f"a={folder}",)) as server:
        body = {"model": "nano:a", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        assert server.post("/v1/chat/completions", body).status_code == 200
        Note(server.url, os.getpid(), server.app.secret).write()
        models = server.client.get("/phimlx/models").json()["models"]
        assert len({each["stamp"] for each in models}) == len(models) == 2
        found = find_loaded(STAMP, None)
        assert found is not None
        assert found.name == "nano"
