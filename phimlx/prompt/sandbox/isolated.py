"""Renders templates that nobody has vouched for in a worker process, which is killed at a limit.

A thread cannot be ended, and a template can stall inside a single call of C. A process can: one
worker is started when it is first needed, kept between renders, and replaced when it was killed.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from phimlx.errors import PromptError
from phimlx.prompt.sandbox.protocol import (
    HINT,
    LENGTH,
    MAX_MEMORY,
    MAX_SECONDS,
    MAX_SOURCE,
    MAX_TEXT,
    TOO_MUCH,
    decode,
    encode,
)

START_SECONDS = 60.0  # for the worker to come up on a busy machine
WATCH_SECONDS = 0.1  # between looks at the worker's memory
MAX_ANSWER = 8 * MAX_TEXT  # bytes

PACKAGES = ("phimlx", "jinja2", "markupsafe")
# Isolated from the environment, the working directory and what site-packages would start.
OPTIONS = ("-I", "-S", "-B")
PROGRAM = (
    "import sys; sys.path += sys.argv[1:]; from phimlx.prompt.sandbox.worker import main; main()"
)


class IsolatedTemplate:
    """A chat template of unknown origin, compiled and rendered by the worker process.

    Attributes:
        variables: the names that the template expects from outside.
        keys: the strings and attributes named in the template, keys of messages among them.
    """

    def __init__(self, source: str) -> None:
        """Raises PromptError where the source is too long, does not parse, or reaches for files."""
        if len(source) > MAX_SOURCE:
            raise PromptError(
                f"The chat template has {len(source)} characters; at most {MAX_SOURCE} are read.",
                hint=HINT,
            )
        self.source = source
        names = worker.ask({"source": source})
        self.variables = frozenset(names["variables"])
        self.keys = frozenset(names["keys"])

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's text for `variables`, which are plain JSON.

        Raises PromptError where the template fails, refuses, does something unsafe, or runs past
        the limits of time, memory and length.
        """
        return str(worker.ask({"source": self.source, "variables": variables})["text"])

    def render_turns(self, variables: Mapping[str, Any]) -> list[str] | None:
        """The text in parts, as of `Template.render_turns`; raises PromptError as `render`."""
        request = {"source": self.source, "variables": variables, "turns": True}
        parts: list[str] | None = worker.ask(request)["parts"]
        return parts


class Worker:
    """The process that renders, and the lock that the threads which ask it take in turn."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket = socket.socket()

    @property
    def pid(self) -> int | None:
        """The process, or None where there is none now."""
        return None if self._process is None else self._process.pid

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's answer. Raises PromptError for its faults, and where it had to be killed."""
        frame = encode(request)
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                answer = self._exchange(frame)
            except BaseException:  # an interrupt as well: what it says now would answer nobody
                self.stop()
                raise
        if "error" in answer:
            raise PromptError(answer["error"], hint=answer["hint"])
        return answer

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._socket.close()

    def forget(self) -> None:
        """Leave the process to the one that this one was forked from."""
        if self._process is not None:
            self._process.returncode = 0  # no child of ours, so that nobody can wait for it
        self._process = None
        self._socket.close()
        self._lock = threading.Lock()

    def _start(self) -> None:
        self.stop()
        folders = {_folder(package): None for package in PACKAGES}
        try:
            self._socket, remote = socket.socketpair()
            with remote:
                self._process = subprocess.Popen(
                    [sys.executable, *OPTIONS, "-c", PROGRAM, *folders],
                    stdin=remote.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,  # Ctrl-C in a terminal is not for it
                )
            self._receive(time.monotonic() + START_SECONDS)
        except OSError as error:
            raise PromptError(
                f"The process that renders chat templates did not start: {error}.",
                hint="Close other programs and try again.",
            ) from error

    def _exchange(self, frame: bytes) -> dict[str, Any]:
        try:
            self._socket.settimeout(MAX_SECONDS)
            self._socket.sendall(frame)
            return self._receive(time.monotonic() + MAX_SECONDS)
        except TimeoutError:
            raise _too_long() from None
        except ConnectionError:
            raise self._explain_end() from None

    def _receive(self, deadline: float) -> dict[str, Any]:
        (size,) = LENGTH.unpack(self._read(LENGTH.size, deadline))
        if size > MAX_ANSWER:
            raise PromptError(TOO_MUCH, hint=HINT)
        return decode(self._read(size, deadline))

    def _read(self, size: int, deadline: float) -> bytes:
        found = bytearray()
        while len(found) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("it took too long")
            self._socket.settimeout(min(left, WATCH_SECONDS))
            try:
                piece = self._socket.recv(min(size - len(found), 2**20))
            except TimeoutError:
                self._check_memory()
                continue
            if not piece:
                raise ConnectionResetError("it ended")
            found += piece
        return bytes(found)

    def _check_memory(self) -> None:
        """Raises PromptError where the process is too large: not every system holds its limit."""
        import psutil

        try:
            used = psutil.Process(self.pid).memory_info().rss
        except psutil.Error:  # it has ended, as the socket says next
            return
        if used > MAX_MEMORY:
            raise PromptError(TOO_MUCH, hint=HINT)

    def _explain_end(self) -> PromptError:
        """Error for a process that ended while it was asked."""
        process = self._process
        if process is not None:
            process.kill()
            if process.wait() == -signal.SIGALRM:
                return _too_long()
        return PromptError("The chat template brought down the process that renders it.", hint=HINT)


def _too_long() -> PromptError:
    return PromptError(
        f"The chat template ran for more than {MAX_SECONDS:g} seconds and was stopped.", hint=HINT
    )


def _folder(package: str) -> str:
    """The folder that a package is imported from."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).resolve().parent.parent)


worker = Worker()
atexit.register(worker.stop)
os.register_at_fork(after_in_child=worker.forget)
