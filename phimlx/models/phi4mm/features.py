"""Features that encoders make of media, their placeholders, and a cache that keeps both."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from phimlx.errors import PromptError
from phimlx.models.cache.kv import Cache, NewTokens
from phimlx.models.rope import Rope

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


class MediaCache(Cache):
    """A cache that keeps each row's features as well, to compute the row again where that is due.

    Args:
        expected_adapters: what each row is known to need in the end, so that a long prompt given
            in pieces starts with the adapter that it will end with.
    """

    def __init__(
        self,
        num_layers: int,
        rope: Rope,
        placeholders: Placeholders,
        expected_length: int = 0,
        expected_adapters: tuple[str | None, ...] = (),
        window: int | None = None,
    ) -> None:
        super().__init__(num_layers, rope, expected_length, window)
        self.placeholders = placeholders
        self.expected_adapters = expected_adapters
        self.features: tuple[Features, ...] = ()  # each row's
        self._pending_features: tuple[Features, ...] = ()

    def features_with(self, new: tuple[Features, ...]) -> tuple[Features, ...]:
        """Each row's features, those of new tokens included."""
        if not self.features:
            return new
        return tuple(past.then(row) for past, row in zip(self.features, new, strict=True))

    def adapters_of(self, features: tuple[Features, ...]) -> tuple[str | None, ...]:
        """The adapter that each row needs, now or as far as is known later."""
        now = tuple(map(adapter_of, features))
        if not self.expected_adapters:
            return now
        order = (*ADAPTERS, None)
        pairs = zip(now, self.expected_adapters, strict=True)
        return tuple(min(pair, key=order.index) for pair in pairs)

    def extend(
        self,
        input_ids: mx.array,
        attention_mask: mx.array | None = None,
        adapters: tuple[str | None, ...] = (),
        features: tuple[Features, ...] = (),
    ) -> NewTokens:
        """As in `Cache`; `features` are each row's, those of earlier tokens included."""
        self._pending_features = features
        return super().extend(input_ids, attention_mask, adapters)

    def commit(self) -> None:
        super().commit()
        self.features = self._pending_features

    def trim(self, length: int) -> None:
        if length >= self.length:
            return
        super().trim(length)
        if self.tokens is None:
            self.features = ()
        elif any(any(row.counts) for row in self.features):
            left = self.placeholders.count(np.array(self.tokens[:, : self.length]))
            self.features = tuple(
                row.between((0, 0), count) for row, count in zip(self.features, left, strict=True)
            )

    @property
    def state(self) -> list[mx.array]:
        held = [rows for row in self.features for rows in row.parts if rows is not None]
        return super().state + held


def _joined(first: mx.array | None, second: mx.array | None) -> mx.array | None:
    if first is None or second is None:
        return second if first is None else first
    return mx.concatenate([first, second])
