"""Files that people hand over, and what is said where they cannot be used."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from phimlx.errors import PromptError, SessionError
from phimlx.terminal.files import read_json, read_tools, write_private


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "{path} is not JSON (line 1, column 2: Expecting property name enclosed in "),
        (b"\xff\xfe", "{path} is not UTF-8 text."),
        (b"[" * 100_000, "{path} is nested too deeply."),
    ],
)
def test_what_is_no_json_is_said(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_bytes(content)
    with pytest.raises(SessionError) as caught:
        read_json(path, SessionError)
    assert str(caught.value).startswith(reason.format(path=path))


def test_a_missing_file_and_a_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(PromptError) as caught:
        read_json(tmp_path / "none", PromptError)
    assert str(caught.value) == f"There is no file {tmp_path / 'none'}."
    with pytest.raises(PromptError) as caught:
        read_json(tmp_path, PromptError)
    assert str(caught.value) == f"{tmp_path} cannot be read: is a directory."


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "{path} holds no tools."),
        ("3", "{path}: Tools must be a list."),
        ('["search"]', "{path}: tools[0] is not an object."),
        ('[{"name": "a"}, {"description": "b"}]', "{path}: tools[1] has no name."),
    ],
)
def test_what_holds_no_tools_is_said(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(content)
    with pytest.raises(PromptError) as caught:
        read_tools(path)
    assert str(caught.value) == reason.format(path=path)
    assert (
        caught.value.hint == 'A tool is {"name": …, "description": …, "parameters": {JSON schema}}.'
    )


def test_tools_are_read_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_bytes(b'\xef\xbb\xbf[{"name": "search"}]')
    assert read_tools(path) == [{"name": "search"}]


def test_a_file_is_replaced_as_a_whole_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, "new ä\n", SessionError)
    assert path.read_text(encoding="utf-8") == "new ä\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["chat.json"]


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "chat.json"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SessionError) as caught:
        write_private(path, "new", SessionError)
    assert str(caught.value) == f"{path} cannot be written: no space left on device."
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["chat.json"]


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    path = tmp_path / "none" / "chat.json"
    with pytest.raises(SessionError) as caught:
        write_private(path, "new", SessionError)
    assert str(caught.value) == f"{path} cannot be written: no such file or directory."
