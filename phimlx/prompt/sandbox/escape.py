"""Keeps text that came from outside apart from the control tokens of a template around it.

Strings are marked before they are rendered, and the marks taken out after.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import Any

# Cuneiform: printable, caseless, and as good as absent from what people type.
MARKS = range(0x12000, 0x110000)


class ControlTokenEscaper:
    """Breaks each spelling of a control token in given strings with a mark.

    The mark goes in after the token's first character, so the token no longer reads as one, while
    a template can still trim, split, compare and join the text. A string that could *complete* a
    token with what stands next to it is marked too: where it ends like the beginning of one,
    begins like the end of one or, if asked for, is a piece from inside one.
    """

    def __init__(self, tokens: Collection[str]) -> None:
        self._tokens = tuple(tokens)

    def choose_mark(self, texts: Iterable[str]) -> str:
        """A character that is in none of the texts, nor in any token."""
        texts = [*texts, *self._tokens]
        return next(
            mark
            for mark in map(chr, MARKS)
            if not any(mark in text or _escaped(mark) in text for text in texts)
        )

    def escape(self, value: Any, mark: str, inside: bool = False) -> Any:
        """`value` with its strings marked, in lists and the keys and values of dicts as well.

        `inside`: mark also strings that are a piece from inside a token.
        """
        if isinstance(value, str):
            return self._escape_text(value, mark, inside)
        if isinstance(value, dict):
            return {self.escape(key, mark): self.escape(item, mark) for key, item in value.items()}
        if isinstance(value, list):
            return [self.escape(item, mark) for item in value]
        return value

    def unescape(self, text: str, mark: str) -> str:
        """`text` without marks, those included that JSON has written as escapes."""
        return text.replace(mark, "").replace(_escaped(mark), "")

    def _escape_text(self, text: str, mark: str, inside: bool) -> str:
        core = text.strip()
        if not core or not self._tokens:
            return text
        marked = self._whole.sub(lambda match: match[0] + mark, core)
        if size := _begun(self._forwards, core[max(0, len(core) - self._longest) :]):
            cut = len(marked) - size + 1
            marked = marked[:cut] + mark + marked[cut:]
        ends_one = _begun(self._backwards, core[: self._longest][::-1])
        if ends_one or (inside and any(core in token for token in self._tokens)):
            marked = mark + marked
        return text.replace(core, marked, 1)

    @cached_property
    def _whole(self) -> re.Pattern[str]:
        """The first character of each token in a text."""
        first = "".join(sorted({re.escape(token[0]) for token in self._tokens}))
        rest = "|".join(re.escape(token[1:]) for token in self._tokens)
        return re.compile(f"[{first}](?={rest})")

    @cached_property
    def _forwards(self) -> list[str]:
        return sorted(self._tokens)

    @cached_property
    def _backwards(self) -> list[str]:
        return sorted(token[::-1] for token in self._tokens)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._tokens))


def _begun(tokens: Sequence[str], text: str) -> int:
    """Size of the shortest end of `text` that a token begins with and goes on from, or 0.

    `tokens` are sorted, so that those that begin with an end follow it at once.
    """
    for size in range(1, len(text) + 1):
        end = text[-size:]
        place = bisect_right(tokens, end)
        if place < len(tokens) and tokens[place].startswith(end):
            return size
    return 0


def _escaped(mark: str) -> str:
    return json.dumps(mark)[1:-1]
