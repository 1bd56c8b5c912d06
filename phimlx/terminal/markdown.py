"""Markdown that arrives in pieces, drawn on a terminal block by block.

Knows text and a rich console. What has scrolled away is final: only the block that still grows
is redrawn, within the height of the screen.
"""

from __future__ import annotations

import re
import time
from types import TracebackType
from typing import ClassVar, Self

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Heading, Markdown
from rich.segment import Segment

from phimlx.terminal.output import printable

_FENCE_START = re.compile(r" *(`{3,}(?=[^`]*$)|~{3,})")
_REDRAW_SECONDS = 0.08
_REDRAW_PAUSE = 5.0  # times as long as a redraw took: it takes time from the model


class BlockSplitter:
    """Cuts a stream of Markdown where a top-level block has ended.

    A block ends before and after a code fence that is not indented, and at a blank line outside
    a fence once the next line begins and is not indented: an indented one may go on with the
    list above it.
    """

    def __init__(self) -> None:
        self.rest = ""
        self._scanned = 0  # characters of `rest` whose lines were looked at
        self._fence = ""
        self._after_blank = False

    def feed(self, text: str) -> list[str]:
        """Take more text, return the blocks that are complete with it."""
        self.rest += text
        blocks: list[str] = []
        while True:
            end = self.rest.find("\n", self._scanned) + 1
            following = self.rest[self._scanned : end or None]
            if self._after_blank and following and not following[0].isspace():
                blocks.append(self._cut(self._scanned))
            elif not end:
                return blocks
            elif self._fence:
                closes = self._is_fence_end(following)
                self._scanned = end
                if closes:
                    self._fence = ""
                    if not following.startswith(" "):
                        blocks.append(self._cut(end))
            else:
                match = _FENCE_START.match(following)
                if match and not following.startswith(" ") and self.rest[: self._scanned].strip():
                    blocks.append(self._cut(self._scanned))
                    continue
                self._fence = match[1] if match else ""
                self._scanned = end
                self._after_blank = not following.strip() and bool(self.rest[:end].strip())

    def finish(self) -> list[str]:
        """The block that was still open."""
        return [self._cut(len(self.rest))] if self.rest else []

    def _is_fence_end(self, line: str) -> bool:
        bare = line.strip()
        return bare.startswith(self._fence) and not bare.strip(self._fence[0])

    def _cut(self, end: int) -> str:
        block, self.rest = self.rest[:end], self.rest[end:]
        self._scanned, self._after_blank, self._fence = 0, False, ""
        return block


class _Heading(Heading):
    """A heading at the left, where text begins."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Markdown(Markdown):
    """Markdown as a model means it.

    HTML and link definitions are shown rather than dropped, a line break is kept, the address
    of a link is shown, and the brackets of formulas, `\\(` and `\\[`, keep their backslash.
    """

    elements: ClassVar = {**Markdown.elements, "heading_open": _Heading}

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False, code_theme="ansi_dark")
        self.parsed = _PARSER.parse(printable(text))
        for token in self.parsed:
            for child in token.children or ():
                _keep_line_break(child)


def render_lines(text: str, console: Console) -> list[list[Segment]]:
    """Lines of one block as the console shows them, without blank ones at either end."""
    lines = console.render_lines(_Markdown(text), pad=False)
    shown = [
        index
        for index, line in enumerate(lines)
        if any(segment.text.strip() for segment in line if not segment.is_control)
    ]
    return lines[shown[0] : shown[-1] + 1] if shown else []


def _keep_line_break(token: Token) -> None:
    if token.type == "softbreak":
        token.type = "hardbreak"


def _keep_formula_bracket(state: StateInline, silent: bool) -> bool:
    if not state.src.startswith(("\\(", "\\)", "\\[", "\\]"), state.pos):
        return False
    if not silent:
        state.pending += state.src[state.pos : state.pos + 2]
    state.pos += 2
    return True


_PARSER = (
    MarkdownIt("commonmark", {"html": False})
    .enable(["strikethrough", "table"])
    .disable("reference")
)
_PARSER.inline.ruler.before("escape", "formula", _keep_formula_bracket)


class _Lines:
    """Rendered lines, each ended."""

    def __init__(self, lines: list[list[Segment]]) -> None:
        self.lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            yield from line
            yield Segment.line()


class MarkdownStream:
    """A context in which Markdown may be written piece by piece.

    A finished block is printed for good, above the one that still grows.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._splitter = BlockSplitter()
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="visible",
        )
        self._next_draw = 0.0
        self._printed = False

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._draw(self._splitter.finish())
        finally:
            self._live.stop()

    def write(self, text: str) -> None:
        """Add text; draw what is complete, and from time to time what is not."""
        blocks = self._splitter.feed(text)
        start = time.monotonic()
        if blocks or start >= self._next_draw:
            self._draw(blocks)
            end = time.monotonic()
            self._next_draw = end + max(_REDRAW_SECONDS, _REDRAW_PAUSE * (end - start))

    def _draw(self, blocks: list[str]) -> None:
        finished: list[list[Segment]] = []
        for block in blocks:
            finished += self._render(block)
        growing = self._render(self._splitter.rest, keep_place=True)
        self._live.update(_Lines(growing[-max(1, self._console.size.height - 2) :]))
        if finished:
            self._console.print(_Lines(finished), end="")
        else:
            self._live.refresh()

    def _render(self, block: str, keep_place: bool = False) -> list[list[Segment]]:
        lines = render_lines(block, self._console)
        if lines and self._printed:
            lines.insert(0, [])
        self._printed = self._printed or (bool(lines) and not keep_place)
        return lines
