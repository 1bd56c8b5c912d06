"""Rows that are too long -> parts that are not: windows of a text, exchanges of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from phimlx.training.data.loss_mask import Encoded
from phimlx.training.data.row_types import Conversation


def windows(tokens: np.ndarray, supervised: np.ndarray, longest: int) -> Iterator[Encoded]:
    """Windows of `longest` tokens, each beginning with the last one of the window before it.

    What a window begins with it only reads, so that every token is learned once.
    """
    for start in range(0, len(tokens) - 1, longest - 1):
        mask = supervised[start : start + longest].copy()
        mask[0] = False
        yield Encoded(tokens[start : start + longest], mask)


def exchanges(
    said: Conversation, encode: Callable[[Conversation], Encoded], longest: int
) -> list[Encoded]:
    """Parts of a conversation, each with as many questions and their answers as fit.

    A part begins with a message of the user that follows a reply, before it what the conversation
    begins with: its system message. One exchange that is longer stays so.
    """
    messages = said.messages
    first = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    borders = [
        i
        for i in range(first + 1, len(messages))
        if messages[i].role == "user" and messages[i - 1].role == "assistant"
    ]

    def part(start: int, stop: int) -> Encoded:
        return encode(said.excerpt(first, start, stop))

    parts: list[Encoded] = []
    start = border = first
    fitting: Encoded | None = None
    for stop in [*borders, len(messages)]:
        longer = part(start, stop)
        if len(longer[0]) > longest and fitting is not None:
            parts.append(fitting)
            start = border
            longer = part(start, stop)
        border, fitting = stop, longer
    return [*parts, longer]
