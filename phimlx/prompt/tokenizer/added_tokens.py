"""Finds where a text spells an added token, by the rules of the `tokenizers` library."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Unicode's White_Space, which is what \s means to the library. Python's \s has U+001C-1F as well.
WHITE_SPACE = frozenset(
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u2028\u2029\u202f\u205f\u3000"
)


@dataclass(frozen=True)
class AddedToken:
    """One entry of `added_tokens`.

    `lstrip` and `rstrip` swallow the white space before and after the token; `single_word` finds
    it only where no word character touches it; `normalized` ones are looked for last.
    """

    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @property
    def is_blank(self) -> bool:
        """White space alone, such as phi-2's runs of spaces: text, and never a control token."""
        return not self.content.strip()


class AddedTokens:
    """Splits a text at the added tokens in it.

    Follows `AddedVocabulary::find_matches` of huggingface/tokenizers: of the tokens that start at
    one place the longest wins, matches do not overlap, tokens that are not `normalized` go first.
    """

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        found = [token for token in tokens if token.content]
        self._by_content = {token.content: token for token in found}
        self._passes = [
            _pattern(token.content for token in found if token.normalized is normalized)
            for normalized in (False, True)
        ]

    def split(self, text: str) -> Iterator[int | str]:
        """The ids of the tokens in `text`, and between them the stretches of other text."""
        return (piece for piece, _ in self.split_with_ends(text))

    def split_with_ends(self, text: str, start: int = 0) -> Iterator[tuple[int | str, int]]:
        """Split `text` from `start` on, where a piece ends; after each piece say where it ends.

        What a token swallows belongs to it.
        """
        return self._split(text, start, self._passes)

    def _split(
        self, text: str, done: int, passes: list[re.Pattern[str] | None]
    ) -> Iterator[tuple[int | str, int]]:
        if not passes:
            yield text, len(text)
            return
        pattern, *later = passes
        for match in pattern.finditer(text, done) if pattern else ():
            token = self._by_content[match[0]]
            start, end = match.span()
            if token.single_word and (
                _is_word(text[start - 1 : start]) or _is_word(text[end : end + 1])
            ):
                continue
            while token.lstrip and start > done and text[start - 1] in WHITE_SPACE:
                start -= 1
            while token.rstrip and end < len(text) and text[end] in WHITE_SPACE:
                end += 1
            if start > done:
                for piece, stop in self._split(text[done:start], 0, later):
                    yield piece, done + stop
            yield token.id, end
            done = end
        if done < len(text):
            for piece, stop in self._split(text[done:], 0, later):
                yield piece, done + stop


def _pattern(contents: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _is_word(character: str) -> bool:
    """Tell whether Rust's \\w takes the character; false for the empty string."""
    if not character:
        return False
    category = unicodedata.category(character)
    return category[0] in "LM" or category in ("Nd", "Nl", "Pc") or character in "\u200c\u200d"
