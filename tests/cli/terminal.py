"""A program on a pseudo-terminal, and a person who waits for what it shows before typing.

Knows bytes, keys and a deadline; interprets no escape sequences but can leave them out.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from pathlib import Path
from types import TracebackType
from typing import Self

DEADLINE = 60.0  # seconds until a program that shows nothing more has failed

CTRL_C, CTRL_D, CTRL_E, CTRL_X = "\x03", "\x04", "\x05", "\x18"
ENTER, ALT_ENTER, UP, TAB = "\r", "\x1b\r", "\x1b[A", "\t"

_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_=>])")


def paste(text: str) -> str:
    """What a terminal sends when `text` is pasted (bracketed paste)."""
    return f"\x1b[200~{text}\x1b[201~"


class Terminal:
    """A running program; `expect` reads until it shows something, `type` sends keys."""

    def __init__(self, arguments: list[str], cwd: Path, **environment: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        self._process = subprocess.Popen(
            arguments,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            start_new_session=True,
            env={
                **inherited,
                "TERM": "xterm-256color",
                "PROMPT_TOOLKIT_NO_CPR": "1",
                **environment,
            },
        )
        os.close(slave)
        self._raw = ""
        self._read_to = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(DEADLINE)
        os.close(self._master)

    @property
    def raw(self) -> str:
        """All that the program has written, with its escape sequences."""
        return self._raw

    def expect(self, text: str) -> str:
        """Read until `text` is shown after what was expected before; return all up to its end.

        Raises `AssertionError` where the program ends, or is silent for too long, without it.
        """
        deadline = time.monotonic() + DEADLINE
        while True:
            shown = _SEQUENCE.sub("", self._raw)
            found = shown.find(text, self._read_to)
            if found >= 0:
                start, self._read_to = self._read_to, found + len(text)
                return shown[start : self._read_to]
            assert self._shows_more(deadline), f"{text!r} was not shown after:\n{shown}"

    def type(self, *keys: str) -> None:
        """Send keys, or text."""
        os.write(self._master, "".join(keys).encode())

    def wait(self) -> int:
        """Read until the program ends; return its exit status."""
        deadline = time.monotonic() + DEADLINE
        while self._shows_more(deadline):
            pass
        return self._process.wait(DEADLINE)

    def echoes(self) -> bool:
        """Whether the terminal shows keys as they are typed."""
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    def _shows_more(self, deadline: float) -> bool:
        """Read what comes next; False where the program has ended or the deadline passes."""
        rest = max(0.0, deadline - time.monotonic())
        if not select.select([self._master], [], [], rest)[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            return False
        self._raw += data.decode(errors="replace")
        return bool(data)
