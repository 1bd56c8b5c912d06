"""The history of what was typed: private, and done without where it cannot be."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from prompt_toolkit.history import FileHistory, InMemoryHistory

from phimlx.terminal.line import open_history
from phimlx.terminal.output import Output


def test_history_is_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state" / "chat_history"
    monkeypatch.setattr("phimlx.terminal.line.history_path", lambda: path)
    for text in ("first", "second\nline"):
        history = open_history(Output())
        assert isinstance(history, FileHistory)
        history.append_string(text)
        path.chmod(0o644)
    assert list(open_history(Output()).load_history_strings()) == ["second\nline", "first"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_history_that_cannot_be_kept_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").write_text("a file, where the folder should be")
    path = tmp_path / "state" / "chat_history"
    monkeypatch.setattr("phimlx.terminal.line.history_path", lambda: path)
    assert isinstance(open_history(Output()), InMemoryHistory)
    assert capsys.readouterr().err == (
        f"Warning: what you type is not kept in {path}: File exists.\n"
    )
