"""Files are read within limits and written as a whole, with the permissions that the user has."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phimlx.errors import ConfigError, PromptError, SessionError
from phimlx.files import (
    parse_toml,
    parse_yaml,
    read_bytes,
    read_json,
    read_json_value,
    read_text,
    replacing,
    translate_write_errors,
    write_file,
    write_json,
)


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    """Sets the umask until the test ends."""
    before = os.umask(0o022)
    os.umask(before)
    yield lambda mask: (os.umask(mask), None)[1]
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "{path} is not JSON (line 1, column 1: Expecting value)."),
        (b"{", "{path} is not JSON (line 1, column 2: Expecting property name enclosed in "),
        (b"\xff\xfe", "{path} is not UTF-8 text."),
        (b"[" * 100_000, "{path} is nested too deeply."),
        (b'{"a":' * 100_000, "{path} is nested too deeply."),
        (b"[" + b"1" * 5000 + b"]", "{path} holds a number that is too long."),
        (b"[]", "{path} is not a JSON object."),
        (b"null", "{path} is not a JSON object."),
        (b'{"a": "' + b"b" * 2000 + b'"}', "{path} is larger than 1.00 kB."),
    ],
)
def test_what_is_no_json_object_is_said(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    limit = 1_000 if b"bbb" in content else 1_000_000
    with pytest.raises(SessionError) as caught:
        read_json(path, SessionError, hint="Do that.", limit=limit)
    assert str(caught.value).startswith(reason.format(path=path))
    assert caught.value.hint == "Do that."


def test_a_missing_file_and_a_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(PromptError) as caught:
        read_json(tmp_path / "none", PromptError)
    assert str(caught.value) == f"There is no file {tmp_path / 'none'}."
    with pytest.raises(ConfigError) as refused:
        read_json(tmp_path)
    assert str(refused.value) == f"{tmp_path} cannot be read: is a directory."
    with pytest.raises(ConfigError) as refused:
        read_json(tmp_path, missing_ok=True)


def test_a_missing_file_may_be_an_empty_object(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none", missing_ok=True) == {}
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ConfigError) as caught:
        read_json(tmp_path / "dangling", missing_ok=True)
    assert str(caught.value) == f"There is no file {tmp_path / 'dangling'}."


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path may have 100 bytes
        bound.bind(path.name)
        os.chdir(here)


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, socket_at, lambda path: path.symlink_to("/dev/zero")],
    ids=["pipe", "socket", "device"],
)
def test_only_regular_files_are_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    make(path)
    with pytest.raises(ConfigError) as caught:
        read_json(path, missing_ok=True)
    assert str(caught.value) == f"{path} is not a regular file."


def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("{")
    before = len(os.listdir("/dev/fd"))
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "text", tmp_path / "none"):
        with pytest.raises(ConfigError):
            read_json(path)
    with pytest.raises(OSError, match="directory"), replacing(tmp_path / "none" / "a"):
        pass
    assert len(os.listdir("/dev/fd")) == before


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf["\xc3\xa4"]')
    assert read_text(path) == '["ä"]'
    assert read_json_value(path) == ["ä"]
    assert read_bytes(path) == path.read_bytes()


@pytest.mark.parametrize(
    ("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664), (0o027, 0o640)]
)
@pytest.mark.parametrize("existing", [None, 0o644, 0o600])
def test_the_umask_decides_who_may_read(
    umask: Callable[[int], None], mask: int, mode: int, existing: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    if existing is not None:
        path.touch()
        path.chmod(existing)
    umask(mask)
    write_json(path, {"a": 1})
    assert mode_of(path) == mode
    write_file(path, "mine", private=True)
    assert mode_of(path) == 0o600


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".json"
        temporary.write_text("new ä\n", encoding="utf-8")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "new ä\n"
    assert os.listdir(tmp_path) == ["chat.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))
    assert path.read_text(encoding="utf-8") == "new ä\n"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (28, "The disk is full: {path} could not be written."),
        (122, "The disk is full: {path} could not be written."),
        (5, "{path} cannot be written: input/output error."),
    ],
)
def test_a_write_that_fails_leaves_the_old_file(
    number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "chat.json"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(SessionError) as caught, translate_write_errors(path, SessionError):
        write_file(path, "new")
    assert str(caught.value) == message.format(path=path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["chat.json"]


def test_places_that_are_no_folder_are_said(tmp_path: Path) -> None:
    path = tmp_path / "none" / "chat.json"
    with pytest.raises(SessionError) as caught, translate_write_errors(path, SessionError):
        write_file(path, "new")
    assert str(caught.value) == f"{path} cannot be written: no such file or directory."
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "out"
    with (
        pytest.raises(SessionError) as caught,
        translate_write_errors(path, SessionError, "Choose."),
    ):
        path.mkdir(parents=True)
    assert str(caught.value) == f"{path} cannot be written: {path} is not a folder."
    assert caught.value.hint == "Choose."


KILLED = """
import os, signal, sys
from pathlib import Path
from phimlx.files import replacing, write_file

def die(*arguments): os.kill(os.getpid(), signal.SIGKILL)

setattr(os, sys.argv[2], die)
write_file(Path(sys.argv[1]), "new" * 1000)
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_killed_write_leaves_the_old_file(moment: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text("old")
    child = subprocess.run([sys.executable, "-c", KILLED, path, moment], timeout=60, check=False)
    assert child.returncode == -9
    assert path.read_text() == "old"
    write_file(path, "newer")  # what is left in the way of another write is nothing
    assert path.read_text() == "newer"


def test_two_writers_at_once_both_succeed(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # which ended last
    assert os.listdir(tmp_path) == ["chat.json"]


def test_a_file_that_another_took_for_left_behind_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, locks = tmp_path / "chat.json", []
    flock = fcntl.flock

    def clean_up_first(descriptor: int, how: int) -> None:
        """Another process looks for what was left, between the file's birth and its lock."""
        if how == fcntl.LOCK_EX:
            locks.append(how)
            if len(locks) < 3:
                [name] = os.listdir(tmp_path)
                (tmp_path / name).unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", clean_up_first)
    write_file(path, "whole")
    assert (path.read_text(), os.listdir(tmp_path), len(locks)) == ("whole", ["chat.json"], 3)


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    (tmp_path / ".chat.0123abcd.json").write_text("half")
    others = {".chat.0123abcd.txt", ".chat.notours1.json", ".chats.0123abcd.json"}
    for name in others:
        (tmp_path / name).touch()
    with replacing(path) as held:  # another writer's, which lives
        write_file(path, "first")
        assert set(os.listdir(tmp_path)) == others | {"chat.json", held.name}
        held.write_text("second")
    assert path.read_text() == "second"
    assert set(os.listdir(tmp_path)) == others | {"chat.json"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = " + "1" * 400, "a number is too long"),
        (".".join("a" * 100) + " = 1", "a key has more than 64 parts"),
        ("a = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
)
def test_toml_of_others_has_bounds(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_toml(text)
    assert parse_toml('a = "' + "b." * 100 + '"') == {"a": "b." * 100}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 0x" + "f" * 400, "a number is too long"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: [1", "line 1"),
        ("a: 2001-99-99", "a value that is none: month must be in 1..12"),
        ("a: !!int x", "a value that is none: invalid literal"),
        ("a: !!bool x", "a value that is none: 'x'"),
        ("&a [*a]", "more than 200,000 values"),
        ("a: !!python/name:os.system", "line 1"),
    ],
)
def test_yaml_of_others_has_bounds(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_yaml(text)


def test_numbers_beyond_every_float_are_infinities(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(f"[{10**400}, -{10**400}, {10**300}, 7]")
    assert read_json_value(path) == [float("inf"), float("-inf"), 10**300, 7]
