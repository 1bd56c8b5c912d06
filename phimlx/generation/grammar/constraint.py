"""Where one reply stands in its grammar: the tokens that may come next."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from phimlx.errors import GrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Constraint:
    """Holds one reply to its grammar.

    Args:
        matcher: at the beginning of the grammar; it belongs to this reply alone.
        stop_tokens: tokens that end the reply, allowed where the grammar may end.

    Attributes:
        ended: whether a stop token has come.
        error: why the reply cannot go on; None while it can.
    """

    def __init__(self, matcher: LLMatcher, stop_tokens: Collection[int]) -> None:
        self._matcher = matcher
        self._stop_tokens = frozenset(stop_tokens)
        self.ended = False
        self.error: GrammarError | None = None

    def advance(self, tokens: Sequence[int]) -> None:
        """Take the next tokens of the reply."""
        for token in tokens:
            if self.ended or self.error is not None:
                return
            if token in self._stop_tokens:
                self.ended = True
            elif not self._matcher.consume_token(token):
                self._fail()

    def restart(self, tokens: Sequence[int]) -> None:
        """Go on as if these were all the tokens of the reply."""
        self._matcher.reset()
        self.ended, self.error = False, None
        self.advance(tokens)

    def fitting(self, draft: Sequence[int]) -> list[int]:
        """The beginning of drafted tokens that the grammar allows, before any stop token."""
        if self.ended or self.error is not None:
            return []
        before = [*itertools.takewhile(lambda token: token not in self._stop_tokens, draft)]
        return before[: self._matcher.validate_tokens(before)]

    def allowed(self, vocab_size: int, draft: Sequence[int] = ()) -> NDArray[np.bool_]:
        """Whether each token may come next, and next behind each of the drafted ones.

        Everything may where the reply has ended, since nothing is made of it.

        Args:
            draft: tokens that are `fitting`.

        Returns:
            bool `[1 + drafted, vocab_size]`.
        """
        places = 1 + len(draft)
        if self.ended or self.error is not None:
            return np.ones((places, vocab_size), np.bool_)
        masks = np.zeros((places, vocab_size), np.bool_)
        for place in range(places):
            if place:
                self._matcher.consume_token(draft[place - 1])
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            known = np.unpackbits(bits, count=vocab_size, bitorder="little")
            masks[place, : len(known)] = known
        if draft:
            self._matcher.rollback(len(draft))
        if self._matcher.is_error() or not masks.any(axis=-1).all():
            self._fail()
            return np.ones_like(masks)
        return masks

    def _fail(self) -> None:
        lines = self._matcher.get_error().splitlines() or ["no token can come next"]
        self.error = GrammarError(
            f"The reply cannot be held to its grammar any further: {lines[0]:.200}.",
            hint="Make the schema or grammar simpler.",
        )
