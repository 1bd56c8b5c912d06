"""The command line in this process on a pseudo-terminal: what it writes there, byte for byte."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from prompt_toolkit.application import create_app_session

from phimlx.cli.main import main

DEADLINE = 60.0  # seconds

SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")


@dataclass(frozen=True)
class Shown:
    """What a run wrote to the terminal, and its exit code."""

    raw: str
    code: int

    @property
    def text(self) -> str:
        return SEQUENCE.sub("", self.raw).replace("\r\n", "\n")


def run_on_terminal(
    arguments: Sequence[str],
    patch: pytest.MonkeyPatch,
    keys: Sequence[tuple[str, str]] = (),
    width: int = 250,
    environment: Mapping[str, str] | None = None,
) -> Shown:
    """Run `phimlx ARGUMENT...`, with stdin, stdout and stderr one terminal.

    Args:
        keys: pairs of a text to wait for, and what is typed then.
        width: of the terminal, in columns; its height is 40 lines.
        environment: variables besides, or instead of, those of a terminal with colours.
    """
    patch.delenv("NO_COLOR", raising=False)
    usual = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
    for name, value in (usual | dict(environment or {})).items():
        patch.setenv(name, value)
    patch.setattr("sys.argv", ["phimlx", *arguments])
    patch.setattr("sys.path", [*sys.path])
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    person = _Person(master, keys)
    try:
        with _standard_streams(slave), create_app_session():  # else the first run's stdin stays
            code = _exit_code()
    finally:
        os.close(slave)
        raw = person.leave()
    assert not person.waits_for, f"{person.waits_for!r} was not shown in:\n{raw}"
    return Shown(raw, code)


def _exit_code() -> int:
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    raise AssertionError("main returned")


@contextmanager
def _standard_streams(slave: int) -> Iterator[None]:
    """Put the terminal in place of the three streams, and all back afterwards."""
    sys.stdout.flush()
    sys.stderr.flush()
    streams = sys.stdin, sys.stdout, sys.stderr
    kept = [os.dup(number) for number in range(3)]
    for number in range(3):
        os.dup2(slave, number)
    modes = ("r", "w", "w")
    try:
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            for number, mode in enumerate(modes)
        )
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
        for number, before in enumerate(kept):
            os.dup2(before, number)
            os.close(before)


class _Person:
    """Reads the terminal in a thread, and types when what is waited for is shown."""

    def __init__(self, master: int, keys: Sequence[tuple[str, str]]) -> None:
        self._master = master
        self._keys = list(keys)
        self._read = bytearray()
        self._seen = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def waits_for(self) -> str | None:
        return self._keys[0][0] if self._keys else None

    def leave(self) -> str:
        """Wait for the end; return all that was written."""
        self._thread.join()
        return self._read.decode(errors="surrogateescape")

    def _watch(self) -> None:
        deadline = time.monotonic() + DEADLINE
        while select.select([self._master], [], [], deadline - time.monotonic())[0]:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not data:
                break
            self._read += data
            shown = SEQUENCE.sub("", self._read.decode(errors="replace"))
            while self._keys and (found := shown.find(self._keys[0][0], self._seen)) >= 0:
                awaited, typed = self._keys.pop(0)
                self._seen = found + len(awaited)
                os.write(self._master, typed.encode(errors="surrogateescape"))
        os.close(self._master)  # hangs up where the deadline has passed
