"""Replies that are written beforehand: the model computes as ever, and other tokens are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from phimlx.api import Phi
from phimlx.generation.sampler import Sampler, Sampling


def tokens_of(phi: Phi, text: str) -> list[int]:
    """The tokens of a reply, its control tokens and its end among them."""
    assert phi.tokenizer is not None
    return [*phi.tokenizer.encode(text, control=True), phi.tokenizer.control_tokens["<|end|>"]]


class Scripted(Sampler):
    """Draws the tokens of a script, whatever the logits are."""

    def __init__(
        self, script: Sequence[int], sampling: Sampling, seed: int, prompt: Sequence[int] = ()
    ) -> None:
        super().__init__(sampling, seed, prompt)
        self._script = script
        self._begin = self._next = 0

    def draw(self, logits: mx.array) -> mx.array:
        self._begin = self._next
        self._next += logits.shape[0]
        padded = [*self._script, *[self._script[-1]] * logits.shape[0]]
        return mx.array(padded[self._begin : self._next])

    def keep(self, count: int) -> None:
        self._next = self._begin + count
