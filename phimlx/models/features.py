"""Features that encoders make of media, and the placeholder tokens that they fill."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from phimlx.errors import PromptError

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


def adapter_of(*features: Features) -> str | None:
    """The adapter of a row that holds all these."""
    held = [any(part) for part in zip(*(f.counts for f in features), strict=True)]
    return next((name for name, holds in zip(ADAPTERS, held, strict=True) if holds), None)


@dataclass(frozen=True)
class Placeholders:
    """Tokens that stand for pictures and sounds and are never embedded themselves."""

    image: int
    audio: int

    @property
    def tokens(self) -> tuple[int, int]:
        return self.image, self.audio

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
