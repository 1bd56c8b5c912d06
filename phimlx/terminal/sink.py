"""The gate to a terminal: what passes it holds no character that a terminal would obey.

`guard_streams` puts the gate in place of stdout and stderr, so that whoever prints in this process,
a library or the interpreter with a traceback, prints through it. This room alone draws beside it,
on `drawing(stream)`, with text that it has cleaned by `printable`.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import select
import sys
from typing import TYPE_CHECKING, Any, TextIO

from phimlx.errors import PhimlxError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_NEVER_SHOWN = "".join(
    re.escape(chr(first)) + "-" + re.escape(chr(last))
    for first, last in (
        (0x00, 0x08),  # C0 without tab and newline; carriage return would overwrite the line
        (0x0B, 0x1F),  # ESC among them: what follows it is then harmless text
        (0x7F, 0x9F),  # DEL and C1, where 0x9B opens a sequence on its own
        (0x2028, 0x202E),  # line separators, and bidirectional embeddings and overrides
        (0x2066, 0x2069),  # bidirectional isolates; marks stay: Hebrew and Arabic need them
        (0xD800, 0xDFFF),  # lone surrogates, which no encoding can write
    )
)
UNPRINTABLE = re.compile(f"[{_NEVER_SHOWN}]")

# How the bars of other libraries (tqdm) begin to draw, and all that they write between lines.
_BAR = re.compile(r"\r|\n*(?:\x1b\[A)+\Z")


class StreamError(PhimlxError):
    """Stdout that takes no more: a full disk, or a descriptor that is closed."""


def printable(text: str) -> str:
    """Remove what a terminal would obey rather than show.

    Works character by character, so that a sequence split over two pieces of a stream is
    disarmed like a whole one.
    """
    return UNPRINTABLE.sub("", text)


def one_line(text: str) -> str:
    """Make `text` printable, as one line: names may hold newlines."""
    return " ".join(printable(text).split())


def indented(text: str) -> str:
    """Indent lines after the first, so that no part of a message stands as a message of its own."""
    return text.rstrip("\n").replace("\n", "\n  ")


class _Descriptor(io.FileIO):
    """A descriptor that fails once: what is written afterwards is dropped, at the end too."""

    def __init__(self, descriptor: int, label: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._label = label
        self._failed = False

    def write(self, data: ReadableBuffer, /) -> int:
        """Write; raises `StreamError` for a failure of stdout. One of stderr can nobody be told."""
        size = memoryview(data).nbytes
        if self._failed:
            return size
        try:
            while (written := super().write(data)) is None:  # a reader that is asked not to wait
                select.select((), (self,), ())
            return written
        except OSError as error:
            self._failed = True
            if self._label == "stderr":
                return size
            if isinstance(error, BrokenPipeError):
                raise
            raise StreamError(f"{self._label} cannot be written: {error.strerror}.") from error


class _Gate(io.TextIOWrapper):
    """A text stream that holds back control characters; `drawn` is the same one without a gate."""

    drawn: TextIO

    def write(self, text: str) -> int:
        """Write what is printable of `text`."""
        moves = match[0] if (match := _BAR.match(text)) else ""
        super().write(moves + printable(text[len(moves) :]))
        return len(text)


def drawing(stream: TextIO) -> TextIO:
    """Return the stream behind the gate, where `stream` is one; for text that is clean."""
    return getattr(stream, "drawn", stream)


def guard_streams() -> None:
    """Put the gate in place of stdout and stderr of this process, for good.

    A descriptor of the three that is closed is taken first, so that no file gets its number: from
    stdin nothing comes, to stdout nothing can be written, and what goes to stderr is dropped.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)  # gets the lowest number there is
    sys.stdout = _guarded(sys.stdout, 1, "stdout")
    sys.stderr = _guarded(sys.stderr, 2, "stderr")


def _guarded(stream: TextIO | None, descriptor: int, label: str) -> TextIO:
    encoding = "utf-8"
    if stream is not None:
        stream.flush()
        descriptor = stream.fileno()
        if codecs.lookup(stream.encoding).name != "ascii":  # no terminal knows ASCII alone
            encoding = stream.encoding
    buffer = io.BufferedWriter(_Descriptor(descriptor, label))
    at_once = label == "stderr" or buffer.isatty()
    settings: Any = {"line_buffering": at_once, "write_through": True}
    gate = _Gate(buffer, encoding, "replace", **settings)
    gate.drawn = io.TextIOWrapper(buffer, encoding, "replace", **settings)
    return gate
