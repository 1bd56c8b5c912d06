"""A key/value cache that keeps each row's media features as well."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from phimlx.models.cache.kv import Cache, NewTokens, Rows, chosen
from phimlx.models.cache.store import Store
from phimlx.models.features import Features, Placeholders
from phimlx.models.lora import LoadedRoutes
from phimlx.models.rope import Rope


class MediaCache(Cache):
    """A cache that keeps each row's features as well, to compute the row again where that is due.

    Args:
        expected_adapters: what each row is known to need in the end, so that a long prompt given
            in pieces starts with the adapter that it will end with.
    """

    def __init__(
        self,
        store: Store,
        rope: Rope,
        placeholders: Placeholders,
        expected_length: int = 0,
        expected_adapters: tuple[str | None, ...] = (),
        window: int | None = None,
        default_adapter: str | None = None,
        loaded_routes: LoadedRoutes | None = None,
    ) -> None:
        super().__init__(store, rope, expected_length, window, default_adapter)
        self.loaded_routes = loaded_routes or LoadedRoutes()
        self.placeholders = placeholders
        self.expected_adapters = expected_adapters
        self._pending_features: tuple[Features, ...] = ()

    def expect(
        self,
        lengths: Sequence[int],
        adapters: tuple[str | None, ...] = (),
        loaded: Sequence[str | None] = (),
    ) -> None:
        super().expect(lengths, adapters, loaded)
        self.expected_adapters = adapters

    def serves(self) -> bool:
        return super().serves() and self.adapters == self.expected_adapters

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        self.features = chosen(self.features, rows)
        self.expected_adapters = chosen(self.expected_adapters, rows)

    def join(self, other: Cache) -> None:
        assert isinstance(other, MediaCache)
        features, expected = other.features, other.expected_adapters or other.adapters
        self.expected_adapters = (self.expected_adapters or self.adapters) + expected
        super().join(other)
        self.features += features

    def row(self, row: int, length: int) -> Cache:
        found = super().row(row, length)
        assert isinstance(found, MediaCache)
        found.expected_adapters = ()
        found._forget_features()
        return found

    def features_with(self, new: tuple[Features, ...]) -> tuple[Features, ...]:
        """Each row's features, those of new tokens included."""
        if not self.features:
            return new
        return tuple(past.then(row) for past, row in zip(self.features, new, strict=True))

    def adapters_of(self, features: tuple[Features, ...]) -> tuple[str | None, ...]:
        """The adapter that each row needs, now or as far as is known later."""
        now = tuple(map(self.placeholders.adapter_of, features))
        if not self.expected_adapters:
            return now
        order = (*self.placeholders.adapters, None)
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

    def _kinds(self, rows: Rows) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
        names = self.placeholders.modalities
        adapters = rows.adapters or (None,) * len(rows.loaded)
        used = [
            self.loaded_routes.of_row(loaded, own, names[own])
            for loaded, own in zip(rows.loaded, adapters, strict=True)
        ]
        return tuple(loaded for loaded, _ in used), tuple(own for _, own in used)

    def commit(self) -> None:
        super().commit()
        self.features = self._pending_features

    def trim(self, length: int) -> None:
        if length >= self.length:
            return
        super().trim(length)
        if self.tokens is None:
            self.features = ()
        self._forget_features()

    def _forget_features(self) -> None:
        """Keep the features of the tokens that are left."""
        if self.tokens is not None and any(any(row.counts) for row in self.features):
            left = self.placeholders.count(np.array(self.tokens[:, : self.length]))
            self.features = tuple(
                row.between((0, 0), count) for row, count in zip(self.features, left, strict=True)
            )

    @property
    def state(self) -> list[mx.array]:
        held = [rows for row in self.features for rows in row.parts if rows is not None]
        return super().state + held
