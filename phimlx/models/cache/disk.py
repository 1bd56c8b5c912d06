"""What a cache of one row consists of, as arrays by name, and a cache made of such arrays.

Beside keys and values stand the tokens, and the features of media: where the row comes to need
other rope factors or another adapter it is computed again, which nobody can without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256

import mlx.core as mx
import numpy as np

from phimlx.models.base import CausalLM
from phimlx.models.cache.kv import Cache
from phimlx.models.cache.store import Form
from phimlx.models.features import TEXT, Features

TOKENS, IMAGES, AUDIO = "tokens", "features.images", "features.audio"


class KVLayout:
    """Which arrays the keys and values of a model are, found by a pass that is never computed.

    Attributes:
        dtype: in which the model computes.
        kv_bits: what keys and values are quantized to; None where they are not.

    Raises:
        GenerationError: where they cannot be quantized so.
    """

    def __init__(self, model: CausalLM, kv_bits: int | None) -> None:
        cache = model.make_cache(kv_bits=kv_bits)
        hidden = model.hidden_states(mx.array([[0]]), cache, features=TEXT)
        self.dtype = hidden.dtype
        self.kv_bits = kv_bits
        self._features = model.feature_widths
        self._store = cache.store

    def forms(self, tokens: int, features: tuple[int, int] = (0, 0)) -> dict[str, Form]:
        """List the arrays of a row.

        Args:
            tokens: of the row.
            features: how many placeholder tokens for images and for audio there are among them.
        """
        found = {TOKENS: Form((tokens,), mx.int32), **self._store.forms(tokens)}
        for name, count, width in zip((IMAGES, AUDIO), features, self._features, strict=True):
            if count:
                found[name] = Form((count, width), self.dtype)
        return found

    def nbytes(self, tokens: int) -> int:
        """Bytes of keys and values of so many tokens."""
        forms = self.forms(tokens).values()
        return sum(int(np.prod(form.shape)) * form.dtype.size for form in forms)


def arrays_of(cache: Cache) -> Iterator[tuple[str, mx.array]]:
    """List the arrays of a cache of one row, in the order of `KVLayout.forms`; none is copied."""
    assert cache.tokens is not None
    yield TOKENS, cache.tokens[0, : cache.length].astype(mx.int32)
    yield from cache.store.parts(cache.length)
    for features in cache.features:
        for name, rows in zip((IMAGES, AUDIO), features.parts, strict=True):
            if rows is not None and rows.shape[0]:
                yield name, rows


def restore(
    model: CausalLM,
    kv_bits: int | None,
    arrays: Mapping[str, mx.array],
    table: int,
    adapter: str | None,
    loaded: str | None,
) -> Cache:
    """Make a cache of one row from its arrays, whose forms have been checked.

    Args:
        table: of `Rope.table`'s frequencies, those that its keys were made with.
        adapter: that the row used, of a model whose checkpoint holds some.
        loaded: and of those that were loaded beside the model.

    Raises:
        CacheError: where what they hold is no sense.
    """
    cache = model.make_cache(kv_bits=kv_bits)
    tokens = arrays[TOKENS]
    cache.length = tokens.shape[0]
    cache.tokens = tokens[None]
    cache.row_lengths, cache.long, cache.loaded = (cache.length,), (table,), (loaded,)
    if model.placeholders is not None:
        cache.adapters = (adapter,)
        cache.features = (Features(arrays.get(IMAGES), arrays.get(AUDIO)),)
    beside = (TOKENS, IMAGES, AUDIO)
    kept = {name: array for name, array in arrays.items() if name not in beside}
    cache.store.restore(kept, cache.length)
    cache.held = cache.length
    return cache


def rope_digest(model: CausalLM, table: int) -> str:
    """Tell a table of frequencies from any other: SHA-256 of all that keys are rotated by."""
    rope = model.config.rope
    numbers: list[float] = rope.inverse_frequencies(table).tolist()  # type: ignore[assignment]
    return sha256(repr((rope.dims, rope.attention_factor, numbers)).encode()).hexdigest()
