"""Markdown that arrives in pieces, drawn on a terminal block by block.

What has scrolled away is final: only the block that still grows
is redrawn, within the height of the screen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
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

_PARSE_AGAIN = 1.25  # times the length that was parsed last: what is parsed in all stays linear
_REDRAW_SECONDS = 0.08
_REDRAW_PAUSE = 5.0  # times as long as a redraw took: it takes time from the model


class BlockSplitter:
    """Cuts a stream of Markdown where a top-level block has ended, as markdown-it's line maps say.

    A block ends before and after a code fence, and at a blank line before anything else that
    begins there without indentation, an item of a list too.
    """

    def __init__(self) -> None:
        self.rest = ""
        self._scanned = 0  # characters of `rest` whose lines were looked at
        self._parse_at = 0  # characters of `rest` to have before it is parsed again

    def feed(self, text: str) -> list[str]:
        """Take more text, return the blocks that are complete with it."""
        self.rest += text
        blocks: list[str] = []
        while end := self.rest.find("\n", self._scanned) + 1:
            self._scanned = end
            if end >= self._parse_at:
                blocks += self._cut(self.rest[:end])
        return blocks

    def finish(self) -> list[str]:
        """Return the blocks that were still open."""
        blocks = [*self._cut(self.rest), self.rest]
        self.rest = ""
        return [block for block in blocks if block]

    def _cut(self, text: str) -> list[str]:
        """Take the finished blocks of `text`, with which `rest` begins, off it."""
        lines = text.split("\n")
        starts = [0, *_block_starts(printable(text))]
        blocks = ["".join(f"{line}\n" for line in lines[a:b]) for a, b in pairwise(starts)]
        cut = sum(map(len, blocks))
        self.rest = self.rest[cut:]
        self._scanned -= cut
        self._parse_at = int((len(text) - cut) * _PARSE_AGAIN)
        return blocks


def _block_starts(text: str) -> Iterator[int]:
    """Lines at which a block after the first one begins."""
    lines = text.split("\n")
    tokens: list[Token] = []
    _PARSER.block.parse(text, _PARSER, {}, tokens)
    before: Token | None = None
    for token in tokens:
        is_item = token.level == 1 and token.type == "list_item_open"
        if token.map is None or not (is_item or token.level == 0):
            continue
        first = token.map[0]
        if before is not None and before.map is not None and before.map[0] != first:
            apart = not lines[first - 1].strip() and not lines[first][:1].isspace()
            if apart or "fence" in (before.type, token.type):
                yield first
        before = token


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
    """Render the lines of one block as the console shows them, without blank ones at either end."""
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
