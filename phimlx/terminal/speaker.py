"""A voice of the system that reads text aloud, sentence by sentence, until it is told to stop."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from shutil import which
from typing import TYPE_CHECKING

from phimlx.errors import PhimlxError, clipped
from phimlx.terminal.spoken import SpokenText

if TYPE_CHECKING:
    from phimlx.generation.reply import Chunk


@dataclass(frozen=True)
class Program:
    """A program that speaks.

    Attributes:
        arguments: of one that reads the text from stdin, or before a text that is an argument.
        takes_argument: whether the text is its last argument; one that begins with - is none
            of its options then.
        stop: arguments that end what it has handed to a service.
    """

    name: str
    arguments: tuple[str, ...]
    takes_argument: bool = False
    stop: tuple[str, ...] = ()


MAC = (Program("say", ("-f", "-")),)
# spd-say's pipe mode would obey lines that begin with !-!.
OTHERS = (
    Program("spd-say", ("--wait", "--"), takes_argument=True, stop=("--cancel",)),
    Program("espeak-ng", ("--stdin",)),
    Program("espeak", ("--stdin",)),
)


def find_program() -> Program:
    """Find what speaks here; raises `PhimlxError` where nothing does."""
    programs = MAC if sys.platform == "darwin" else OTHERS
    for program in programs:
        if which(program.name):
            return program
    names = [program.name for program in programs]
    listed = f"neither {', '.join(names[:-1])} nor {names[-1]} is" if names[1:] else "say is not"
    raise PhimlxError(
        f"Nothing here reads text aloud: {listed} installed.",
        hint=None
        if sys.platform == "darwin"
        else "Install one, on Debian and Ubuntu with: sudo apt install espeak-ng",
    )


class Speaker:
    """Reads replies aloud as they come, in a thread of its own.

    `failure` says why it speaks no more, once it does not.
    """

    def __init__(self, program: Program | None = None) -> None:
        """Make a speaker; raises `PhimlxError` where nothing here reads text aloud."""
        self.program = program or find_program()
        self.failure: str | None = None
        self._text = SpokenText()
        self._waiting: deque[str] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended: subprocess.Popen[bytes] | None = None  # that was told to stop
        self._changed = threading.Condition()
        threading.Thread(target=self._speak, daemon=True).start()

    @property
    def is_speaking(self) -> bool:
        """Whether there is something left to say."""
        with self._changed:
            return self._is_speaking()

    def hear(self, chunk: Chunk) -> None:
        """Take the next part of a reply; its reasoning is not read."""
        if chunk.kind == "text":
            self._add(self._text.add(chunk.text))

    def end(self) -> None:
        """Note that the reply ends there."""
        self._add(self._text.end())

    def stop(self) -> None:
        """Be quiet at once."""
        self._text = SpokenText()
        with self._changed:
            was_speaking = self._is_speaking()
            self._waiting.clear()
            if self._process is not None:
                self._process.terminate()
                self._ended = self._process
        if was_speaking and self.program.stop:
            self._run_stop()

    def wait(self) -> None:
        """Return once all is said; Ctrl-C comes through."""
        with self._changed:
            while self._is_speaking():
                self._changed.wait(0.1)

    def _is_speaking(self) -> bool:
        return bool(self._waiting) or self._process not in (None, self._ended)

    def _add(self, sentences: list[str]) -> None:
        with self._changed:
            if self.failure is None:
                self._waiting.extend(sentences)
                self._changed.notify_all()

    def _speak(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                process = self._begin(self._waiting.popleft())
                self._process = process
            if process is not None:
                self._finish(process)
            with self._changed:
                self._process = None
                if self.failure is not None:
                    self._waiting.clear()
                self._changed.notify_all()

    def _begin(self, text: str) -> subprocess.Popen[bytes] | None:
        program = self.program
        given = (text,) if program.takes_argument else ()
        try:
            process = subprocess.Popen(
                [program.name, *program.arguments, *given],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is ours to hand on
            )
        except OSError as error:
            self.failure = f"{program.name} cannot be run: {error.strerror}."
            return None
        self._input = b"" if program.takes_argument else text.encode("utf-8", "replace")
        return process

    def _finish(self, process: subprocess.Popen[bytes]) -> None:
        told = process.communicate(self._input)[1].decode(errors="replace").splitlines()
        # espeak-ng says so where there is no device that plays sound, and ends as if it had spoken.
        errors = [line for line in told if line.startswith("error:")]
        if process.returncode > 0 or errors:
            why = errors[-1] if errors else f"it ended with code {process.returncode}"
            self.failure = f"{self.program.name} cannot speak: {clipped(why)}."

    def _run_stop(self) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                [self.program.name, *self.program.stop],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=5,
            )
