"""A reply in Markdown as it is said aloud: sentences as they end, without code and marks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

_SENTENCE = re.compile(r".+?(?:[.!?…]+[\"'”’»)\]]*(?=\s)|[。！？]+[」』”]*|$)", re.DOTALL)
_ADDRESS = re.compile(r"(?:https?://|www\.)([^\s/?#]+)\S*")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
# Marks that stand around words, left where a sentence ends before its mark does.
_MARKS = re.compile(r"\*+|`+|~~+|(?<!\w)_+|_+(?!\w)|\|")
# What voices of macOS and espeak obey: [[slnc 5000]].
_ORDER = re.compile(r"\[\[+")


class SpokenText:
    """A reply on its way, from which sentences come as soon as they have ended."""

    def __init__(self) -> None:
        self._block = ""  # what is not done with
        self._said = 0  # sentences of it

    def add(self, text: str) -> list[str]:
        """Take the next part of the reply; return the sentences that it ends."""
        self._block += text
        ready: list[str] = []
        while (end := _end_of_block(self._block)) is not None:
            ready += sentences(self._block[:end])[self._said :]
            self._block, self._said = self._block[end:], 0
        if any(each.isspace() or each in "。！？" for each in text):
            ended = sentences(self._block)[:-1]
            ready += ended[self._said :]
            self._said = max(self._said, len(ended))
        return ready

    def end(self) -> list[str]:
        """Return what is left once the reply has ended."""
        left = sentences(self._block)[self._said :]
        self._block, self._said = "", 0
        return left


def sentences(markdown: str) -> list[str]:
    """Return what is to be read of a text, without code, tables row by row."""
    found: list[str] = []
    row: list[str] | None = None
    for token in _parser().parse(markdown):
        if token.type == "tr_open":
            row = []
        elif token.type == "tr_close":
            found += _split(", ".join(row or ()))
            row = None
        elif token.type == "inline":
            text = _plain(token.children or ())
            if row is None:
                found += _split(text)
            elif text.strip():
                row.append(text.strip())
    return found


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").enable("table")


def _plain(tokens: Iterable[Token]) -> str:
    parts: list[str] = []
    for token in tokens:
        if token.type in ("text", "code_inline"):
            parts.append(token.content)
        elif token.type in ("softbreak", "hardbreak"):
            parts.append(" ")
        elif token.type == "image":
            parts.append(_plain(token.children or ()))
    return "".join(parts)


def _split(text: str) -> list[str]:
    """The sentences of a plain text that hold something to say."""
    text = _ADDRESS.sub(r"\1", text)
    cleaned = (_ORDER.sub("[", _MARKS.sub("", each)) for each in _SENTENCE.findall(text))
    whole = (" ".join(each.split()) for each in cleaned)
    return [each for each in whole if any(character.isalnum() for character in each)]


def _end_of_block(text: str) -> int | None:
    """Where the first block ends, at an empty line or the end of a fence; None while it goes on."""
    fence, place, begun = "", 0, False
    for line in text.splitlines(keepends=True):
        place += len(line)
        if not line.endswith("\n"):
            return None
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
                return place
        elif mark:
            fence = mark[1]
        elif not line.strip() and begun:
            return place
        begun = begun or bool(line.strip())
    return None
