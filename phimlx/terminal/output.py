"""The one place that prints: text, tables and JSON to stdout, notes and errors to stderr.

Terminal control characters never pass it.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TextIO

from phimlx.errors import PhimlxError, system_error
from phimlx.terminal.progress import (
    Progress,
    beside_bars,
    live_line,
    progress,
    prompt_progress,
    status,
)
from phimlx.terminal.sink import UNPRINTABLE, drawing, indented, one_line, printable

__all__ = ["Output", "encode_json", "printable", "progress", "status", "style"]

_STYLES = {"bold": "1", "dim": "2", "red": "31", "yellow": "33", "cyan": "36"}

USUAL_WIDTH = 80  # of a terminal that does not tell

AGAIN = "Run it again with --debug to see where it happened."


def encode_json(value: Any, indent: int | None = None) -> str:
    """Encode JSON that loses no character and yet holds none that `printable` would remove.

    A number that is not finite, which JSON cannot say, becomes null.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    if any(name in text for name in ("NaN", "Infinity")):
        finite = json.loads(text, parse_constant=lambda name: None)
        text = json.dumps(finite, ensure_ascii=False, indent=indent)
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


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

    @property
    def width(self) -> int | None:
        """Columns of the terminal at stderr; None where there is none."""
        try:
            return os.get_terminal_size(sys.stderr.fileno()).columns or USUAL_WIDTH
        except (OSError, ValueError):  # no terminal, or a stream without a descriptor
            return USUAL_WIDTH if self.is_watched else None

    @property
    def can_ask(self) -> bool:
        """Whether somebody sits at a terminal to answer a question."""
        return sys.stdin is not None and sys.stdin.isatty() and self.is_watched

    def write(self, text: str, style_name: str | None = None) -> None:
        """Put `text` on stdout at once, without a newline of its own."""
        if text and not self.as_json:
            _put(sys.stdout, text, style_name)
            self.flush()

    def text(self, text: str = "", style_name: str | None = None) -> None:
        """Put one or more whole lines on stdout."""
        if not self.as_json:
            _put(sys.stdout, text, style_name, end="\n")

    def json(self, value: Any) -> None:
        """Put the command's result on stdout as one JSON object."""
        if self.as_json:
            _put(sys.stdout, encode_json(value, indent=2), end="\n")

    def to_clipboard(self, text: str) -> bool:
        """Ask the terminal to put text on the clipboard (OSC 52); False where there is none."""
        if not self.is_terminal or os.environ.get("TERM") == "dumb":
            return False
        data = base64.b64encode(text.encode("utf-8", "replace")).decode()
        drawing(sys.stdout).write(f"\x1b]52;c;{data}\x07")
        self.flush()
        return True

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Put a table on stdout; columns of numbers are aligned to the right.

        Cells are wrapped to the width of a terminal, and never wrapped elsewhere.
        """
        if not self.as_json:
            drawing(sys.stdout).write(_render_table(columns, rows, self.is_terminal))

    def flush(self) -> None:
        """Hand what waits to the reader of stdout; raises `StreamError` where it cannot be."""
        sys.stdout.flush()

    def note(self, text: str, style_name: str | None = "dim") -> None:
        """Put a remark on stderr: a hint, a warning, what a command is about to do."""
        _put(sys.stderr, indented(text), style_name, end="\n")

    def aside(self, text: str) -> None:
        """Put text on stderr at once, dimmed and without a newline of its own.

        It goes with a result rather than into it, so only a terminal gets it.
        """
        if text and self.is_watched and not self.as_json:
            _put(sys.stderr, text, "dim")

    def warning(self, text: str) -> None:
        """Put a warning on stderr."""
        self.note(f"Warning: {text}", "yellow")

    def failure(self, error: BaseException) -> None:
        """Tell of the error that ends the run: as `error`, and as the result with `json`."""
        message, hint = self._explained(error)
        result = error.result if isinstance(error, PhimlxError) else {}
        self.error(error)
        self.json({**result, "error": {"message": message, "hint": hint}})
        self.flush()

    def _explained(self, error: BaseException) -> tuple[str, str | None]:
        """Return a sentence about an error, and the next step."""
        known = error if isinstance(error, PhimlxError) else system_error(error)
        if known is not None:
            return str(known), known.hint
        message = f"unexpected {type(error).__name__}: {error}".removesuffix(": ")
        return message, None if self.debug else AGAIN

    def error(self, error: BaseException) -> None:
        """Put one sentence about `error` on stderr, and the next step; with debug the traceback."""
        if self.debug:
            _put(sys.stderr, "".join(traceback.format_exception(error)))
        message, hint = self._explained(error)
        _put(sys.stderr, "Error:", "red")
        _put(sys.stderr, f" {indented(message)}", end="\n")
        if hint:
            _put(sys.stderr, "Hint:", "cyan")
            _put(sys.stderr, f" {indented(hint)}", end="\n")

    def confirm(self, question: str, default: bool = False) -> bool:
        """Ask a question on stderr to be answered by yes or no; see `can_ask` before.

        Raises `click.Abort` for Ctrl-C and Ctrl-D.
        """
        import click

        return click.confirm(one_line(question), default=default, err=True)

    def beside_bars(self) -> AbstractContextManager[None]:
        """Leave bars whole while the block prints: see `phimlx.terminal.progress`."""
        return beside_bars()

    def progress(
        self, total: float | None, label: str, unit: str = "it"
    ) -> AbstractContextManager[Progress]:
        """Draw a progress bar on stderr: see `phimlx.terminal.progress`."""
        return progress(total, one_line(label), unit, quiet=self.as_json)

    def prompt_progress(self) -> AbstractContextManager[Callable[[int, int], None]]:
        """Draw a bar on stderr while a long prompt is read: see `phimlx.terminal.progress`."""
        return prompt_progress(quiet=self.as_json)

    def live_line(self) -> AbstractContextManager[Callable[[str], None]]:
        """Replace one line on stderr again and again: see `phimlx.terminal.progress`."""
        return live_line(quiet=self.as_json)

    def status(self, label: str) -> AbstractContextManager[None]:
        """Show a line on stderr while the block runs: see `phimlx.terminal.progress`."""
        return status(one_line(label), quiet=self.as_json)


def _put(stream: TextIO, text: str, style_name: str | None = None, end: str = "") -> None:
    """Write what is printable of `text`, in a style: the one way in which text is printed."""
    clean = printable(text)
    if clean and style_name:
        clean = style(clean, style_name, stream)
    drawing(stream).write(clean + end)
    if stream is sys.stderr:
        stream.flush()


def _render_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], fit_terminal: bool
) -> str:
    from io import StringIO

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = [printable(column) for column in columns]
    cells = [[printable("" if cell is None else str(cell)) for cell in row] for row in rows]
    coloured = has_colour(sys.stdout)
    console = Console(
        file=StringIO(),
        force_terminal=coloured,
        no_color=not coloured,
        width=None if fit_terminal else 10_000,
    )
    if _narrowest(names, cells) > console.width:
        return _stacked(names, cells)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, name in enumerate(names):
        given = [row[index] for row in rows if row[index] not in ("", None)]
        numeric = bool(given) and all(isinstance(cell, int | float) for cell in given)
        justify: Literal["left", "right"] = "right" if numeric else "left"
        table.add_column(Text(name), justify=justify, no_wrap=index == 0, overflow="fold")
    for texts in cells:
        table.add_row(*map(Text, texts))
    with console.capture() as capture:
        console.print(table)
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


def _narrowest(names: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    """Columns of a terminal that a table takes at least, with no word cut and no name wrapped."""
    from rich.cells import cell_len

    width = 3 * (len(names) - 1)  # between columns
    for index, name in enumerate(names):
        texts = [name, *(row[index] for row in cells)]
        width += max(
            (cell_len(part) for text in texts for part in ([text] if index == 0 else text.split())),
            default=0,
        )
    return width


def _stacked(names: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Write each row of a table as lines, for a terminal that is too narrow."""
    lines = []
    for first, *rest in cells:
        lines.append(first)
        lines += [f"  {name}: {text}" for name, text in zip(names[1:], rest, strict=True) if text]
    return "".join(f"{line}\n" for line in lines)
