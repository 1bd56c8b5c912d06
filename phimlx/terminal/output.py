"""The one place that prints: text, tables and JSON to stdout, notes and errors to stderr.

Terminal control characters never pass it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TextIO

from phimlx.errors import PhimlxError
from phimlx.terminal.progress import Progress, progress, prompt_progress, status

__all__ = ["Output", "encode_json", "printable", "progress", "status", "style"]

_NEVER_SHOWN = "".join(
    re.escape(chr(first)) + "-" + re.escape(chr(last))
    for first, last in (
        (0x00, 0x08),  # C0 without tab and newline; carriage return would overwrite the line
        (0x0B, 0x1F),  # ESC among them: what follows it is then harmless text
        (0x7F, 0x9F),  # DEL and C1, where 0x9B opens a sequence on its own
        (0x202A, 0x202E),  # bidirectional embeddings and overrides: text that reads as another
        (0x2066, 0x2069),
        (0xD800, 0xDFFF),  # lone surrogates, which no encoding can write
    )
)
_UNPRINTABLE = re.compile(f"[{_NEVER_SHOWN}]")
_STYLES = {"bold": "1", "dim": "2", "red": "31", "yellow": "33", "cyan": "36"}


def printable(text: str) -> str:
    """Remove what a terminal would obey rather than show.

    Works character by character, so that a sequence split over two pieces of a stream is
    disarmed like a whole one.
    """
    return _UNPRINTABLE.sub("", text)


def encode_json(value: Any, indent: int | None = None) -> str:
    """Encode JSON that loses no character and yet holds none that `printable` would remove."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def has_colour(stream: TextIO) -> bool:
    """Tell whether `stream` is a terminal that may be coloured (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def style(text: str, name: str, stream: TextIO) -> str:
    """Put `text` in style `name` where `stream` shows styles."""
    return f"\x1b[{_STYLES[name]}m{text}\x1b[0m" if has_colour(stream) else text


class Output:
    """A command's results and remarks.

    Results go to stdout: `text`, `write` and `table` for people, or with `json=True` the one
    object given to `json`; the form that was not asked for is not printed, so a command may
    offer both. Remarks go to stderr in either form.

    Control characters are removed from text whether or not stdout is a terminal, for a pipe
    often ends at one (`| tee log`, `| less -R`). `json` keeps every character, escaped.
    """

    def __init__(self, json: bool = False, debug: bool = False) -> None:
        self.as_json = json
        self.debug = debug

    @property
    def is_terminal(self) -> bool:
        """Whether stdout is a terminal."""
        return sys.stdout.isatty()

    @property
    def is_watched(self) -> bool:
        """Whether stderr is a terminal."""
        return sys.stderr.isatty()

    def write(self, text: str, style_name: str | None = None) -> None:
        """Put `text` on stdout at once, without a newline of its own."""
        if self.as_json:
            return
        clean = printable(text)
        if clean:
            sys.stdout.write(style(clean, style_name, sys.stdout) if style_name else clean)
            sys.stdout.flush()

    def text(self, text: str = "", style_name: str | None = None) -> None:
        """Put one or more whole lines on stdout."""
        if self.as_json:
            return
        clean = printable(text)
        sys.stdout.write((style(clean, style_name, sys.stdout) if style_name else clean) + "\n")

    def json(self, value: Any) -> None:
        """Put the command's result on stdout as one JSON object."""
        if self.as_json:
            sys.stdout.write(encode_json(value, indent=2) + "\n")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Put a table on stdout; columns of numbers are aligned to the right.

        Cells are wrapped to the width of a terminal, and never wrapped elsewhere.
        """
        if not self.as_json:
            sys.stdout.write(_render_table(columns, rows, self.is_terminal))

    def note(self, text: str, style_name: str | None = "dim") -> None:
        """Put a remark on stderr: a hint, a warning, what a command is about to do."""
        clean = printable(text)
        sys.stderr.write((style(clean, style_name, sys.stderr) if style_name else clean) + "\n")
        sys.stderr.flush()

    def aside(self, text: str) -> None:
        """Put text on stderr at once, dimmed and without a newline of its own.

        It goes with a result rather than into it, so only a terminal gets it.
        """
        clean = printable(text)
        if clean and self.is_watched and not self.as_json:
            sys.stderr.write(style(clean, "dim", sys.stderr))
            sys.stderr.flush()

    def warning(self, text: str) -> None:
        """Put a warning on stderr."""
        self.note(f"Warning: {text}", "yellow")

    def error(self, error: BaseException) -> None:
        """Put one sentence about `error` on stderr, and the next step; with debug the traceback."""
        if self.debug:
            sys.stderr.write(printable("".join(traceback.format_exception(error))))
        if isinstance(error, PhimlxError):
            message, hint = str(error), error.hint
        else:
            message = f"unexpected {type(error).__name__}: {error}".removesuffix(": ")
            hint = None if self.debug else "Run it again with --debug to see where it happened."
        sys.stderr.write(f"{style('Error:', 'red', sys.stderr)} {printable(message)}\n")
        if hint:
            sys.stderr.write(f"{style('Hint:', 'cyan', sys.stderr)} {printable(hint)}\n")
        sys.stderr.flush()

    def progress(
        self, total: float | None, label: str, unit: str = "it"
    ) -> AbstractContextManager[Progress]:
        """Draw a progress bar on stderr: see `phimlx.terminal.progress`."""
        return progress(total, label, unit, quiet=self.as_json)

    def prompt_progress(self) -> AbstractContextManager[Callable[[int, int], None]]:
        """Draw a bar on stderr while a long prompt is read: see `phimlx.terminal.progress`."""
        return prompt_progress(quiet=self.as_json)

    def status(self, label: str) -> AbstractContextManager[None]:
        """Show a line on stderr while the block runs: see `phimlx.terminal.progress`."""
        return status(printable(label), quiet=self.as_json)


def _render_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], fit_terminal: bool
) -> str:
    from io import StringIO

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows if row[index] not in ("", None)]
        numeric = bool(cells) and all(isinstance(cell, int | float) for cell in cells)
        table.add_column(Text(printable(column)), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(printable("" if cell is None else str(cell))) for cell in row))
    coloured = has_colour(sys.stdout)
    console = Console(
        file=StringIO(),
        force_terminal=coloured,
        no_color=not coloured,
        width=None if fit_terminal else 10_000,
    )
    with console.capture() as capture:
        console.print(table)
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())
