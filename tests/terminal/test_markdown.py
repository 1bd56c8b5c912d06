"""Markdown in pieces: where blocks end, what is shown, and that what was printed stays."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from phimlx.terminal import markdown
from phimlx.terminal.markdown import BlockSplitter, MarkdownStream, render_lines

DOCUMENT = """\
# Title

Some text
that goes on.

1. one

   more of one

2. two
- a bullet
```py
def f():

    return "```"
```
after
    ~~~
    indented

    fence
    ~~~
~~~~
~~~
~~~~
end"""

BLOCKS = [
    "# Title\n\n",
    "Some text\nthat goes on.\n\n",
    "1. one\n\n   more of one\n\n",
    "2. two\n- a bullet\n",
    '```py\ndef f():\n\n    return "```"\n```\n',
    "after\n    ~~~\n    indented\n\n    fence\n    ~~~\n",
    "~~~~\n~~~\n~~~~\n",
    "end",
]


def split(pieces: list[str]) -> list[str]:
    splitter = BlockSplitter()
    blocks = [block for piece in pieces for block in splitter.feed(piece)]
    return [*blocks, *splitter.finish()]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_blocks_end_where_they_end_whatever_the_pieces(size: int) -> None:
    pieces = [DOCUMENT[start : start + size] for start in range(0, len(DOCUMENT), size)]
    assert split(pieces) == BLOCKS


@given(st.lists(st.text("a`~ \n-1.", max_size=12)))
def test_nothing_is_lost_and_pieces_do_not_matter(pieces: list[str]) -> None:
    blocks = split(pieces)
    assert "".join(blocks) == "".join(pieces)
    assert blocks == split(["".join(pieces)])


@pytest.mark.parametrize(
    "blocks",
    [
        ["- a\n\n  ```\n  x\n\n  y\n  ```\n\n", "b"],  # a fence that belongs to an item
        ["> ```\n> x\n\n", "y\n\n", "```\n"],  # the quotation's fence ends with it
        ["| a | b |\n|---|---|\n| 1 | 2 |\n\n", "c"],
        ["  ```\n  x\n\n  y\n  ```\n", "a"],  # up to three blanks are no indentation
        ["```\n~~~\n\n```\n", "x\n"],
        ["a\n===\n\n", "b"],
        ["\n\n# a\n\n", "# b\n"],
    ],
)
def test_blocks_are_those_of_commonmark(blocks: list[str]) -> None:
    assert split(["".join(blocks)]) == [block for block in blocks if block]


@pytest.mark.parametrize(
    "text",
    [
        "```\n" + "line\n" * 1000 + "```\n",
        "a paragraph\n\n" * 500,
        "- item\n" * 1000,
        "word\n" * 1000,
        "> quoted\n" * 1000,
    ],
    ids=["fence", "paragraphs", "list", "paragraph", "quotation"],
)
def test_what_is_parsed_in_all_grows_as_the_text(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = 0
    parse = markdown._PARSER.block.parse

    def counted(source: str, *rest: Any) -> Any:
        nonlocal parsed
        parsed += len(source)
        return parse(source, *rest)

    monkeypatch.setattr(markdown._PARSER.block, "parse", counted)
    assert "".join(split([text[start : start + 3] for start in range(0, len(text), 3)])) == text
    assert parsed < 7 * len(text)


def shown(text: str) -> list[str]:
    console = Console(file=io.StringIO(), width=40, color_system=None)
    return [
        "".join(segment.text for segment in line).rstrip() for line in render_lines(text, console)
    ]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("# Title", ["Title"]),
        ("one\ntwo", ["one", "two"]),
        ("use <b>bold</b>", ["use <b>bold</b>"]),
        ("<div>\nx\n</div>", ["<div>", "x", "</div>"]),
        ("[a]: http://x.y", ["[a]: http://x.y"]),
        ("[here](http://x.y)", ["here (http://x.y)"]),
        (r"\(x_1\) \[y\] 5 \* 3 `\(`", [r"\(x_1\) \[y\] 5 * 3 \("]),
        ("- a\n- b", [" • a", " • b"]),
        ("3. c", [" 3 c"]),
        ("```py\nx = 1\n```", [" x = 1"]),
        ("a\x1b[2Jb", ["a[2Jb"]),
        ("\n\n", []),
    ],
)
def test_what_a_block_shows(text: str, lines: list[str]) -> None:
    assert shown(text) == lines


class Screen:
    """A terminal reduced to what rich needs: text, newlines, cursor up and erase line."""

    def __init__(self) -> None:
        self.lines = [""]
        self.row = 0
        self.highest = 0

    def write(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
            if part == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif part == "\x1b[2K":
                self.lines[self.row] = ""
            elif re.fullmatch(r"\x1b\[\d*A", part):
                self.row -= int(part[2:-1] or 1)
                self.highest = max(self.highest, len(self.lines) - self.row)
            elif part[0] not in "\x1b\r":
                self.lines[self.row] += part


def draw(pieces: list[str], height: int, monkeypatch: pytest.MonkeyPatch) -> Screen:
    """What a terminal shows in the end, every piece having been drawn."""
    monkeypatch.setattr("phimlx.terminal.markdown._REDRAW_SECONDS", 0)
    monkeypatch.setattr("phimlx.terminal.markdown._REDRAW_PAUSE", 0)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    file = io.StringIO()
    console = Console(
        file=file,
        width=40,
        height=height,
        force_terminal=True,
        color_system=None,
        legacy_windows=False,
    )
    with MarkdownStream(console) as stream:
        for piece in pieces:
            stream.write(piece)
    screen.write(file.getvalue())
    return screen


def test_a_stream_ends_as_the_whole_would_look(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [DOCUMENT[start : start + 3] for start in range(0, len(DOCUMENT), 3)]
    lines = [line.rstrip() for line in draw(pieces, 50, monkeypatch).lines]
    expected = "\n\n".join("\n".join(shown(block)) for block in BLOCKS)
    assert "\n".join(lines).rstrip("\n") == expected


def test_only_what_fits_the_screen_is_ever_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "```\n" + "".join(f"line {number}\n" for number in range(100)) + "```\n"
    pieces = code.splitlines(keepends=True)
    screen = draw([*pieces, "end"], 12, monkeypatch)
    lines = [line.strip() for line in screen.lines]
    assert [line for line in lines if line] == [*(f"line {n}" for n in range(100)), "end"]
    assert screen.highest <= 12
