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
from rich.markdown import Heading, Markdown, Paragraph
from rich.segment import Segment
from rich.text import Text

from phimlx.terminal.sink import printable

_PARSE_AGAIN = 1.25  # times the length that was parsed last: what is parsed in all stays linear
_FEED = 4096  # characters whose blocks are cut off at once
_NESTING = 40  # levels that are parsed; markdown-it drops what stands deeper, so it stays text
_WINDOW_LINES, _WINDOW_CHARACTERS = 200, 20_000  # of a block that grows, which are drawn
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
        blocks: list[str] = []
        for start in range(0, len(text), _FEED):
            self.rest += text[start : start + _FEED]
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


class _Paragraph(Paragraph):
    """A paragraph line by line: rich takes the square of a text's lines to split it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = self.justify
        yield from self.text.split(allow_blank=True)


CODE_THEMES = {
    **dict.fromkeys(("auto", "dark", "plain"), "ansi_dark"),
    "light": "ansi_light",
}
"""Colours of code by the user's theme."""


class _Markdown(Markdown):
    """Markdown as a model means it.

    HTML and link definitions are shown rather than dropped, a line break is kept, the address
    of a link is shown, and the brackets of formulas, `\\(` and `\\[`, keep their backslash.
    """

    elements: ClassVar = {
        **Markdown.elements,
        "heading_open": _Heading,
        "paragraph_open": _Paragraph,
    }

    def __init__(self, text: str, theme: str) -> None:
        super().__init__("", hyperlinks=False, code_theme=CODE_THEMES[theme])
        self.parsed = _PARSER.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                _keep_line_break(child)


def render_lines(text: str, console: Console, theme: str = "auto") -> list[list[Segment]]:
    """Render the lines of one block as the console shows them, without blank ones at either end.

    They are printable whatever the text says: addresses and entities are decoded on the way.
    """
    text = printable(text)
    markdown = _Markdown(text, theme)
    deepest = min(_NESTING - 1, console.width // 5)  # a level takes up to four columns
    too_deep = any(
        token.level >= deepest and token.type in ("blockquote_open", "list_item_open")
        for token in markdown.parsed
    )
    rendered = console.render_lines(Text(text) if too_deep else markdown, pad=False)
    lines = [
        [Segment(printable(segment.text), segment.style) for segment in line] for line in rendered
    ]
    shown = [index for index, line in enumerate(lines) if any(part.text.strip() for part in line)]
    return lines[shown[0] : shown[-1] + 1] if shown else []


def window(text: str) -> str:
    """Shorten a block that grows to its end, so that drawing it again takes as long every time.

    What a fence or a table begins with stays before it.
    """
    cut = max(0, len(text) - _WINDOW_CHARACTERS)
    lines = text[cut:].split("\n")
    if not cut and len(lines) <= _WINDOW_LINES:
        return text
    first, second = (*text[:_WINDOW_CHARACTERS].split("\n", 2), "")[:2]
    head: list[str] = []
    if first.lstrip().startswith(("```", "~~~")):
        head = [first]
    elif set(second.strip()) <= set("|-: ") and "|" in first and "-" in second:
        head = [first, second]
    return "\n".join([*head, *lines[1:][-_WINDOW_LINES:]])


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
    MarkdownIt("commonmark", {"html": False, "maxNesting": _NESTING})
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

    def __init__(self, console: Console, theme: str = "auto") -> None:
        self._console = console
        self._theme = theme
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
        growing = self._render(window(self._splitter.rest), keep_place=True)
        self._live.update(_Lines(growing[-max(1, self._console.size.height - 2) :]))
        if finished:
            self._console.print(_Lines(finished), end="")
        else:
            self._live.refresh()

    def _render(self, block: str, keep_place: bool = False) -> list[list[Segment]]:
        lines = render_lines(block, self._console, self._theme)
        if lines and self._printed:
            lines.insert(0, [])
        self._printed = self._printed or (bool(lines) and not keep_place)
        return lines
