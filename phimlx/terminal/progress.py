"""Progress of long work, on stderr and only where a person watches it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Protocol

from phimlx.terminal.sink import drawing

ERASE_LINE = "\r\x1b[2K"


class Progress(Protocol):
    """A bar in the hands of what works; `total` may be set when it becomes known."""

    total: float | None

    def update(self, n: float) -> object:
        """Report `n` more units done."""


class _Silent:
    total: float | None = None

    def update(self, n: float) -> None:
        """Count nothing: nobody is watching."""


@contextlib.contextmanager
def prompt_progress(quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Make a function to call with the tokens of a prompt computed and to compute.

    It draws a bar only where a prompt takes more than one step.
    """
    with contextlib.ExitStack() as drawing:
        bar: Progress | None = None
        seen = 0

        def report(done: int, total: int) -> None:
            nonlocal bar, seen
            if bar is None and done < total:
                bar = drawing.enter_context(progress(total, "Reading the prompt", " tokens", quiet))
            if bar is not None:
                bar.update(done - seen)
                seen = done
            if done >= total:
                drawing.close()

        yield report


@contextlib.contextmanager
def progress(
    total: float | None, label: str, unit: str = "it", quiet: bool = False
) -> Iterator[Progress]:
    """Draw a tqdm bar on stderr while the block runs; silent off a terminal or when `quiet`.

    `unit` "B" counts bytes, in the decimal units of `phimlx.sizes`. `total` None draws a count
    alone. `label` is one line and printable, as `phimlx.terminal.sink.one_line` makes it.
    """
    if quiet or not sys.stderr.isatty():
        yield _Silent()
        return
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=label,
        unit=unit,
        unit_scale=unit == "B",
        file=drawing(sys.stderr),
        leave=False,
        dynamic_ncols=True,
    ) as bar:
        yield bar


@contextlib.contextmanager
def status(label: str, quiet: bool = False) -> Iterator[None]:
    """Show one printable line on stderr while the block runs, then take it away."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    screen = drawing(sys.stderr)
    screen.write(label)
    screen.flush()
    try:
        yield
    finally:
        screen.write(ERASE_LINE)
        screen.flush()


@contextlib.contextmanager
def live_line(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Make a function that replaces one printable line on stderr; "" takes it away.

    It shows nothing off a terminal or when `quiet`.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    screen = drawing(sys.stderr)

    def show(text: str) -> None:
        screen.write(ERASE_LINE + text)
        screen.flush()

    try:
        yield show
    finally:
        show("")


@contextlib.contextmanager
def beside_bars() -> Iterator[None]:
    """Take bars away while the block prints, and draw them again below it."""
    if not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=drawing(sys.stderr)):
        yield
