"""Log-probabilities of tokens, under the distribution as the model gives it.

They come from the logits before anything is done to them: no temperature, penalty, bias or mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from phimlx.machine.reductions import split_logsumexp

MAX_TOP = 20  # alternatives that may be asked for; OpenAI's limit
CHUNK = 128  # places whose logits exist at one time, of a prompt that is scored


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability, and what is likeliest in its place.

    Attributes:
        top: the likeliest tokens and their log-probabilities, falling, as many as were asked for;
            the token itself may be one of them.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    def as_object(self) -> dict[str, Any]:
        """Make an object of JSON."""
        top = [{"token": token, "logprob": value} for token, value in self.top]
        return {"token": self.token, "logprob": self.logprob, "top": top}


class Logprobs:
    """Log-probabilities of one token at each of several places.

    Nothing here waits for a value before `read`.

    Args:
        logits: `[places, vocab]`.
        tokens: `[places]`.
        top: how many alternatives are kept.
    """

    def __init__(self, logits: mx.array, tokens: mx.array, top: int) -> None:
        logits = logits.astype(mx.float32)
        largest, log_total = split_logsumexp(logits)  # [places, 1]
        top = min(top, logits.shape[-1])
        likeliest = mx.argpartition(-logits, top - 1, axis=-1)[:, :top] if top else None
        places = [tokens.astype(mx.uint32)[:, None]]
        places += [] if likeliest is None else [likeliest]
        self._tokens = mx.concatenate(places, axis=-1)  # [places, 1 + top]
        values = mx.take_along_axis(logits, self._tokens, axis=-1)
        self._values = (values - largest) - log_total  # [places, 1 + top]
        self.arrays = (self._tokens, self._values)

    def read(self, place: int, top: int) -> TokenLogprob:
        """The token at a place, with so many alternatives."""
        tokens, values = self._lists
        (token, *others), (value, *more) = tokens[place], values[place]
        ranked = sorted(zip(others, more, strict=True), key=lambda pair: (-pair[1], pair[0]))
        return TokenLogprob(token, value, tuple(ranked[:top]))

    @cached_property
    def _lists(self) -> tuple[list[list[int]], list[list[float]]]:
        return self._tokens.tolist(), self._values.tolist()  # type: ignore[return-value]


@dataclass(frozen=True)
class RowLogprobs:
    """Those of one row of a batch, at the places of its last pass, the first of them at `first`."""

    found: Logprobs
    first: int
    top: int

    def at(self, place: int) -> TokenLogprob:
        """The token drawn at a place of the row."""
        return self.found.read(self.first + place, self.top)


def score_rows(
    logits: mx.array, tokens: mx.array, tops: Sequence[int | None]
) -> list[RowLogprobs | None]:
    """Score the tokens drawn for those rows that ask for it; the others take no part.

    Args:
        logits: `[rows · places, vocab]`, unchanged.
        tokens: `[rows · places]`.
        tops: of each row how many alternatives, None where it does not ask.
    """
    asked = [row for row, top in enumerate(tops) if top is not None]
    if not asked:
        return [None] * len(tops)
    if len(asked) < len(tops):  # of several rows, which have a place each
        index = mx.array(asked)
        logits, tokens = logits[index], tokens[index]
    found = Logprobs(logits, tokens, max(top for top in tops if top is not None))
    places = iter(range(len(asked)))
    return [None if top is None else RowLogprobs(found, next(places), top) for top in tops]


def score_prompt(
    head: Callable[[mx.array], mx.array], hidden: mx.array, tokens: mx.array, top: int
) -> list[TokenLogprob | None]:
    """Score tokens of a prompt, each from the hidden state of the one before it.

    What stands for media and is no token of the vocabulary, below 0, has no probability: None.

    Args:
        head: turns hidden states into logits.
        hidden: `[places, hidden]`; logits of `CHUNK` places exist at one time.
        tokens: `[places]`.
        top: how many alternatives.
    """
    scores: list[TokenLogprob | None] = []
    for begin in range(0, tokens.size, CHUNK):
        here = slice(begin, begin + CHUNK)
        found = Logprobs(head(hidden[here]), mx.maximum(tokens[here], 0), top)
        numbers: list[int] = tokens[here].tolist()  # type: ignore[assignment]
        places = enumerate(numbers)
        scores += [found.read(place, top) if token >= 0 else None for place, token in places]
    return scores
