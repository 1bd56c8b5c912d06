"""Prefixes in memory: what rows of a batch leave to requests that begin as they did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from phimlx.generation.placed_media import MediaItem
from phimlx.generation.prompt_cache import Prefixes, PromptCache, shared_tokens
from phimlx.generation.request import Request
from phimlx.models.base import CausalLM
from phimlx.models.cache.kv import Cache

LEAST = 16  # tokens from which on a prefix is worth a copy


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a cache, and what its first columns stand for.

    Attributes:
        tokens: `[length]`.
        items: images and sounds among them.
        kv, row: where their keys and values are.
    """

    tokens: np.ndarray
    items: tuple[MediaItem, ...]
    kv: Cache
    row: int = 0

    @classmethod
    def of(cls, request: Request, cache: PromptCache, kv: Cache, row: int = 0) -> Row:
        """Describe the row of a request that is being computed."""
        length = min(kv.row_lengths[row], len(request.tokens))
        tokens = np.array(request.tokens[:length], np.int32)
        return cls(tokens, cache.items_within(length), kv, row)

    def serves(self, length: int, adapter: str | None, loaded: str | None) -> bool:
        """Whether a prompt of so many tokens, which calls for adapters, can go on from here."""
        rope, adapters = self.kv.rope, self.kv.adapters
        same = not adapters or adapters[self.row] == adapter
        same = same and self.kv.loaded[self.row] == loaded
        return same and rope.serves(self.kv.long[self.row], rope.table(length))

    def begins(self, other: Row) -> bool:
        """Whether another row holds all that this one does."""
        kinds = [
            (kv.kv_bits, kv.long[row], kv.adapters[row : row + 1], kv.loaded[row])
            for kv, row in ((self.kv, self.row), (other.kv, other.row))
        ]
        if kinds[0] != kinds[1]:
            return False
        shared = shared_tokens(self.tokens, self.items, other.tokens, other.items)
        return shared == len(self.tokens)


class PrefixPool:
    """Rows that have ended, those used last within a limit of memory.

    Args:
        model: whose keys and values they are.
        limit: bytes of all rows; none is held where it is 0.
        store: looked in for more of a prompt than is in memory; None where there is none.

    Attributes:
        live: lists the rows that are being computed, of which requests copy what they share.
    """

    def __init__(self, model: CausalLM, limit: int, store: Prefixes | None = None) -> None:
        self.limit = limit
        self.live: Callable[[], Iterable[Row]] = tuple
        self._model = model
        self._store = store
        self._rows: list[Row] = []  # the one used last at the end

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take."""
        return sum(row.kv.nbytes for row in self._rows)

    @property
    def caches(self) -> list[PromptCache]:
        """The rows as prompt caches, the one used last at the end; to be read, not to be used."""
        return [PromptCache.restored(self._model, row.kv, row.items) for row in self._rows]

    def find(
        self,
        prompt: list[int],
        items: tuple[MediaItem, ...],
        adapter: str | None,
        loaded: str | None,
        kv_bits: int | None,
        shared: int,
    ) -> PromptCache | None:
        """Give the cache that shares most with a prompt, where that is more than `shared` tokens.

        A row that the prompt goes on from is handed over. Of others, and of those that are being
        computed, what is shared is copied. A row with the prompt's images and sounds is of use for
        their features where its keys and values are not.
        """
        wanted = np.array(prompt[:-1], np.int32)
        best, most = None, (shared, shared)
        for row in (*reversed(self._rows), *self.live()):
            if row.kv.kv_bits != kv_bits:
                continue
            common = shared_tokens(row.tokens, row.items, wanted, items)
            usable = common if row.serves(len(prompt), adapter, loaded) else 0
            if max(usable, common if items else 0) >= LEAST and (usable, common) > most:
                best, most = row, (usable, common)
        if self._store is not None:
            stored = self._store.find(prompt, items, adapter, loaded, kv_bits, most[0])
            if stored is not None:
                return stored
        return None if best is None else self._take(best, most[1])

    def _take(self, row: Row, shared: int) -> PromptCache:
        kv = row.kv.row(row.row, shared)
        if row not in self._rows:
            kv.part()  # whoever computes the row goes on to write to it
        else:
            self._rows.remove(row)
            if shared < len(row.tokens):
                self._rows.append(row)
        return PromptCache.restored(self._model, kv, row.items)

    def put(self, cache: PromptCache, tokens: Sequence[int]) -> None:
        """Take what a request has left: the keys and values of these tokens, or the first of them.

        Rows that are a beginning of it go. It stays until another comes even where it alone takes
        more than the limit, for what goes on from a long prompt is worth most.
        """
        kv = cache.kv
        if kv.length < LEAST or not kv.rope.serves(kv.long[0], kv.long[0]):
            return
        new = Row(np.array(tokens[: kv.length], np.int32), cache.items, kv)
        if any(new.begins(row) for row in self._rows):
            return
        if kv.store.columns > kv.length:
            kv.part()
        self._rows = [row for row in self._rows if not row.begins(new)] + [new]
        self.shrink(max(self.limit, new.kv.nbytes) if self.limit else 0)

    def shrink(self, nbytes: int) -> None:
        """Let the rows go that were used longest ago, until no more than so many bytes are left."""
        held = [row.kv.nbytes for row in self._rows]
        left, first = sum(held), 0
        while left > nbytes and first < len(held):
            left -= held[first]
            first += 1
        del self._rows[:first]
