"""Features that encoders make of media, and the placeholder tokens that they fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from phimlx.errors import PromptError

KINDS = ("image", "audio")
ADAPTERS = ("vision", "speech")  # the first whose pictures or sounds a row holds is its adapter


@dataclass(frozen=True)
class Features:
    """Rows that stand at placeholders in place of embeddings, in the order of the placeholders.

    Attributes:
        images: `[tokens, hidden]`, projected; None where there are none.
        audio: `[tokens, attention_dim]`, not yet projected, since the projection depends on the
            adapter; None where there is none.
    """

    images: mx.array | None = None
    audio: mx.array | None = None

    @property
    def counts(self) -> tuple[int, int]:
        """Image placeholders and audio placeholders that this fills."""
        return tuple(0 if rows is None else rows.shape[0] for rows in self.parts)  # type: ignore[return-value]

    @property
    def parts(self) -> tuple[mx.array | None, mx.array | None]:
        return self.images, self.audio

    def between(self, start: tuple[int, int], end: tuple[int, int]) -> Features:
        """Select the rows from `start` to `end`, each a count of image and audio placeholders."""
        chosen = [
            None if rows is None or begin >= stop else rows[begin:stop]
            for rows, begin, stop in zip(self.parts, start, end, strict=True)
        ]
        return Features(*chosen)

    def then(self, other: Features) -> Features:
        """This, and what follows it in the same row."""
        return Features(*map(_joined, self.parts, other.parts))


TEXT = Features()
"""Given with tokens without placeholders: they are not looked at, which would wait for them."""


NONE = -1
"""In place of a placeholder token, for media that a model does not take."""


@dataclass(frozen=True)
class Placeholders:
    """Tokens that stand for pictures and sounds and are never embedded themselves.

    Attributes:
        image, audio: a negative number is no token of the vocabulary; NONE where the model takes
            none of the kind.
        adapters: names of the checkpoint's own adapters for what holds pictures and what holds
            sounds; empty where it has none.
    """

    image: int
    audio: int = NONE
    adapters: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[int, int]:
        return self.image, self.audio

    @property
    def by_kind(self) -> dict[str, int]:
        """Tokens of the kinds of media that the model takes."""
        return {
            kind: token for kind, token in zip(KINDS, self.tokens, strict=True) if token != NONE
        }

    @property
    def in_vocabulary(self) -> list[int]:
        """Those of them that logits are computed of, and that no reply may hold."""
        return [token for token in self.tokens if token >= 0]

    @property
    def modalities(self) -> dict[str | None, str]:
        """What a row holds that uses each of the adapters, or none: its first kind, or text."""
        return {None: "text"} | dict(zip(self.adapters, KINDS, strict=False))

    def adapter_of(self, *features: Features) -> str | None:
        """The adapter of a row that holds all these."""
        return self.adapter_for([any(f.counts[kind] for f in features) for kind in range(2)])

    def adapter_for(self, held: Sequence[bool]) -> str | None:
        """The adapter of a row, by whether it holds pictures and whether it holds sounds."""
        return next((name for name, holds in zip(self.adapters, held, strict=False) if holds), None)

    def places(self, ids: np.ndarray) -> list[np.ndarray]:
        """Find the image and the audio placeholders of `ids`, counted row after row."""
        return [np.flatnonzero(ids == token) for token in self.tokens]

    def count(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """Image placeholders and audio placeholders of each row of `ids` `[batch, length]`."""
        columns = [(ids == token).sum(axis=1).tolist() for token in self.tokens]
        return list(zip(*columns, strict=True))

    def by_row(self, input_ids: mx.array, features: Features | None) -> tuple[Features, ...]:
        """The features of each row, given those of all rows.

        Raises:
            PromptError: where there are more placeholders than features, or fewer.
        """
        if features is TEXT:
            return (TEXT,) * input_ids.shape[0]
        features = features or TEXT
        counts = self.count(np.array(input_ids))
        placeholders = (sum(images for images, _ in counts), sum(audio for _, audio in counts))
        for kind, wanted, given in zip(
            ("image", "audio"), placeholders, features.counts, strict=True
        ):
            if wanted != given:
                raise PromptError(
                    f"The input has {wanted} {kind} placeholders, but the {kind} features given "
                    f"fill {given}."
                )
        rows, start = [], (0, 0)
        for images, audio in counts:
            end = (start[0] + images, start[1] + audio)
            rows.append(features.between(start, end))
            start = end
        return tuple(rows)


def _joined(first: mx.array | None, second: mx.array | None) -> mx.array | None:
    if first is None or second is None:
        return second if first is None else first
    return mx.concatenate([first, second])
