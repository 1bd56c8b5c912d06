"""Drafts of the next tokens, taken from the text itself, and how many of them are worth a pass.

Source: prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding); a draft is verified
in one pass, as in speculative decoding (arXiv 2211.17192), against the sampler's own draws.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

MAX_DRAFT = 31
MIN_MATCH = 2  # tokens that must stand before as they stand at the end
MAX_MATCH = 32  # tokens that are compared
SMOOTHING = 0.1  # weight of the last token in a running share
# What a draft has to promise: below it the next pass is begun before the last one's token is known.
MIN_GAIN = 1.05
# By the bit length of the number of matching tokens: how often the next one follows as it did
# before. Each text soon has shares of its own.
SHARES = (0.0, 0.1, 0.25, 0.45, 0.7, 0.85, 0.95)


class PromptLookup:
    """Finds what followed the last tokens of a text where they stood before.

    It also watches what it would have drafted while nothing is drafted, so that drafts begin as
    soon as a text repeats itself, and stop when it does not.

    Args:
        tokens: the text so far.
        cost: of a pass over so many tokens, relative to a pass over one.
        never: tokens that a reply cannot hold.
        last: tokens that end a reply.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        cost: Callable[[int], float],
        never: Collection[int] = (),
        last: Collection[int] = (),
    ) -> None:
        self._cost = [cost(length) for length in range(1, MAX_DRAFT + 2)]
        self._never, self._last = frozenset(never), frozenset(last)
        self._tokens = np.empty(max(1024, 2 * len(tokens)), np.int64)
        self._tokens[: len(tokens)] = tokens
        self._length = len(tokens)
        self._shares = list(SHARES)
        self._next = 0  # where what may follow stands; 0 for nowhere
        self._matched = 0
        self._search()

    def __len__(self) -> int:
        return self._length

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text."""
        for token in tokens:
            self._add(token)

    def draft(self, limit: int = MAX_DRAFT) -> list[int]:
        """Guess the next tokens, at most `limit`: as many as make a pass worth most, or none."""
        end = min(self._length, self._next + min(limit, MAX_DRAFT)) if self._next else 0
        expected = share = best = 1.0
        count = 0
        drafted: list[int] = []
        for token in self._tokens[self._next : end].tolist():
            if token in self._never or (drafted and drafted[-1] in self._last):
                break
            share *= self._shares[_bucket(self._matched + len(drafted))]
            expected += share
            drafted.append(token)
            gain = expected / self._cost[len(drafted)]
            if gain > best:
                best, count = gain, len(drafted)
        return drafted[:count] if best >= MIN_GAIN else []

    def _add(self, token: int) -> None:
        if self._length == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
        self._tokens[self._length] = token
        self._length += 1
        if self._next:
            hit = bool(self._tokens[self._next] == token)
            bucket = _bucket(self._matched)
            self._shares[bucket] += SMOOTHING * (hit - self._shares[bucket])
            if hit:
                self._next, self._matched = self._next + 1, self._matched + 1
                return
        self._search()

    def _search(self) -> None:
        """Find the longest of the text's endings that stands in it before, the last such place."""
        text = self._tokens[: self._length]
        self._next = self._matched = 0
        if self._length <= MIN_MATCH:
            return
        ends = np.flatnonzero(text[:-1] == text[-1])
        matched = 1
        while len(ends) and matched < MAX_MATCH:
            longer = ends[ends >= matched]
            longer = longer[text[longer - matched] == text[-1 - matched]]
            if not len(longer):
                break
            ends, matched = longer, matched + 1
        if len(ends) and matched >= MIN_MATCH:
            self._next, self._matched = int(ends[-1]) + 1, matched


def _bucket(matched: int) -> int:
    return min(matched.bit_length(), len(SHARES) - 1)
