"""Markdown in pieces: where blocks end, what is shown, and that what was printed stays."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.segment import Segment

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


DRIVING = "\x1b]52;c;QUJD\x07\x1b[2J\x9b7m\x9d0;t\x9c\x7f\u202e\u2066\u2028"
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def encoded(text: str) -> list[str]:
    """Ways in which Markdown says a text: as it is, as entities, in addresses."""
    quoted = "".join(f"%{byte:02x}" for byte in text.encode())
    entities = "".join(f"&#x{ord(character):x};" for character in text)
    decimal = "".join(f"&#{ord(character)};" for character in text)
    return [
        *(text, entities, decimal, f"<http://e/{quoted}>", f"<mailto:{quoted}@e.fr>"),
        *(f"[a](http://e/{quoted} '{entities}')", f"[{entities}](<{quoted}>)"),
        *(f"![{entities}]({quoted})", f"<{quoted}@e.fr>", f"<x{entities}>"),
    ]


@pytest.mark.parametrize(
    "place",
    [
        *("{}", "# {}", "{}\n===", "- {}", "1. {}", "> {}", "- > {}", "**{}**", "~~{}~~", "`{}`"),
        *("| {} |\n|---|\n| {} |", "```{}\n{}\n```", "    {}", "{}  \n{}", "[{}](a)", "\\[{}\\]"),
        *("<b>{}</b>", "[a]: {}"),
    ],
)
def test_nothing_of_a_reply_is_obeyed(place: str) -> None:
    for text in encoded(DRIVING):
        lines = shown(f"before {place.replace('{}', text)} after")
        lines += shown(place.replace("{}", text))
        assert lines
        assert not OBEYED.search("".join(lines))


@given(st.text("<>&#x1b;%9fhtp:/[]()!`*|-\n\x1b\x9b\u202e"))
def test_nothing_of_any_reply_is_obeyed(text: str) -> None:
    assert not OBEYED.search("".join(shown(text)))


@pytest.mark.parametrize("opening", ["> ", "- ", "1. ", "> - "])
def test_what_stands_deeper_than_is_parsed_is_shown_as_text(opening: str) -> None:
    assert any("kept" in line for line in shown(opening * 30 + "kept"))


@pytest.mark.parametrize(
    "piece",
    [
        *("word\n", "\n", "> quoted\n", "- item\n", "| 1 | 2 |\n", "word ", "**a *b ", "[a]("),
        *("`a` ", "&amp;", "<http://e/> "),
    ],
)
@pytest.mark.parametrize("opening", ["", "```py\n", "| a | b |\n|---|---|\n"])
def test_what_is_drawn_in_all_grows_as_the_text(
    piece: str, opening: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def counted(text: str, console: Console, theme: str) -> list[Any]:
        lengths.append(len(text))
        return []

    monkeypatch.setattr(markdown, "render_lines", counted)
    text = opening + piece * 4000
    draw([text[start : start + 500] for start in range(0, len(text), 500)], 30, monkeypatch)
    final = [length for length in lengths if length > len(opening) + 20_000]
    assert sum(final) <= len(text)  # each finished block once, at whatever length


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\n" * 1000, "a\n" * 199),
        ("```py\n" + "x\n" * 1000, "```py\n" + "x\n" * 199),
        ("| a |\n|---|\n" + "| 1 |\n" * 1000, "| a |\n|---|\n" + "| 1 |\n" * 199),
        ("a\n" * 199, "a\n" * 199),
        ("x" * 50_000, ""),
        ("x\n" + "y" * 19_998, "x\n" + "y" * 19_998),
    ],
)
def test_the_end_of_a_block_that_grows(text: str, seen: str) -> None:
    assert markdown.window(text) == seen


def test_lines_are_split_once(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    split_lines = Segment.split_and_crop_lines

    def counted(segments: Any, *rest: Any, **more: Any) -> Any:
        nonlocal longest
        found = list(segments)
        longest = max([longest, *(segment.text.count("\n") for segment in found)])
        return split_lines(found, *rest, **more)

    monkeypatch.setattr(Segment, "split_and_crop_lines", counted)
    assert len(shown("word\n" * 500)) == 500
    assert longest <= 1


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
