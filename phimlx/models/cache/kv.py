"""Keys and values of the tokens seen so far, and the LongRoPE table and adapters behind them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from phimlx.models.cache.store import Store
from phimlx.models.features import Features
from phimlx.models.lora import DEFAULT, Routing
from phimlx.models.rope import Rope

T = TypeVar("T")


class Rows(NamedTuple):
    """What is known of each row."""

    lengths: tuple[int, ...] = ()
    long: tuple[int, ...] = ()
    adapters: tuple[str | None, ...] = ()
    loaded: tuple[str | None, ...] = ()


class NewTokens(NamedTuple):
    """Tokens of one forward pass: their positions, and what each may attend to."""

    positions: mx.array  # [batch or 1, length]
    long: tuple[int, ...]  # for each row, which of `Rope.table`'s frequencies it uses
    mask: mx.array | str | None  # for mx.fast.scaled_dot_product_attention
    routing: Routing | None  # which rows use which adapters; None where none does


class Cache:
    """Key/value cache of one batch of rows, all layers together.

    The keys of a LongRoPE model depend on the length of the *whole* sequence, and those of a model
    with adapters on what stands anywhere in it, so the cache keeps the tokens as well: when a row
    comes to need other rope factors or another adapter, `tokens_to_recompute` hands back what has
    to be computed again. Columns are shared by all rows; where rows differ in length, `valid` tells
    real columns from padding, on either side.

    Some layers keep less than keys and values of every token, such as a state, from which no token
    can be taken again. Where they cannot go back to where a sequence is cut, `held` is less than
    `length`, and `tokens_to_recompute` hands back what is between.

    Args:
        store: where keys and values go.
        rope: the model's frequencies.
        expected_length: length that the rows are known to reach, so that a long prompt given in
            pieces starts with the rope factors that it will end with.
        window: how many tokens each attends to, itself and those before it; None for all.
        default_adapter: the loaded adapter of rows of which nothing else is said.
    """

    def __init__(
        self,
        store: Store,
        rope: Rope,
        expected_length: int = 0,
        window: int | None = None,
        default_adapter: str | None = None,
    ) -> None:
        self.store = store
        self.rope = rope
        self.expected_length = expected_length
        self.expected_lengths: tuple[int, ...] = ()  # each row's, where they are known apart
        self.window = window
        self.length = 0  # columns that count
        self.held = 0  # the first of them, whose keys and values are there
        self.tokens: mx.array | None = None  # [batch, columns]
        self.valid: mx.array | None = None  # [batch, columns], None where every column is real
        self.row_lengths: tuple[int, ...] = ()  # real tokens of each row
        self.long: tuple[int, ...] = ()  # with which of `Rope.table`'s frequencies
        self.adapters: tuple[str | None, ...] = ()  # and the adapter, where the model has some
        self.loaded: tuple[str | None, ...] = ()  # and the one that was loaded beside the model
        self.expected_loaded: tuple[str | None, ...] = ()  # that each row is to use
        self.default_adapter = default_adapter
        self.features: tuple[Features, ...] = ()  # each row's, where the model takes media
        self._pending = Rows()  # what `commit` will make true
        self._routing: Routing | None = None
        self._routed: tuple[tuple[str | None, ...], ...] = ()  # the rows that it is for

    def tokens_to_recompute(
        self,
        shape: tuple[int, int],
        attention_mask: mx.array | None,
        adapters: tuple[str | None, ...] = (),
    ) -> tuple[mx.array, mx.array | None] | None:
        """Tokens and mask to compute again before `shape` more tokens come, or None.

        Rows that cross `original_max_position_embeddings`, in either direction, or come to use
        another of `adapters` or of the loaded ones, need every key and value anew; others, what is
        not `held`. The cache is then as far as that, and the caller feeds what it is given first.
        """
        if self.length == 0 or self.tokens is None:
            return None
        long = self._long_rows(self._lengths_after(shape, attention_mask))
        same = adapters == self.adapters and self._loaded_rows(shape[0]) == self.loaded
        begin = self.held if same and self._go_on(long, shape[1]) else 0
        if begin == self.length:
            return None
        tokens = self.tokens[:, begin : self.length]
        valid = None if self.valid is None else self.valid[:, begin : self.length]
        self.trim(begin)
        return tokens, valid

    def extend(
        self,
        input_ids: mx.array,
        attention_mask: mx.array | None = None,
        adapters: tuple[str | None, ...] = (),
    ) -> NewTokens:
        """Take note of new tokens; their keys and values follow layer by layer in `attend`.

        Args:
            input_ids: `[batch, length]`.
            attention_mask: `[batch, length]`, 0 where a row is padded; None where none is.
            adapters: each row's, of a model that has some.
        """
        batch, length = input_ids.shape
        before = self.row_lengths or (0,) * batch
        row_lengths = self._lengths_after((batch, length), attention_mask)
        long = self._long_rows(row_lengths)
        self._pending = Rows(row_lengths, long, adapters, self._loaded_rows(batch))
        routing = self._route(self._pending)
        # A prompt that comes in pieces has room for all of it from the first on.
        expected = (self.expected_length, *self.expected_lengths)
        self.store.reserve(max(self.length + length, *expected), self.length)
        if self.length and self.tokens is not None:
            input_ids = mx.concatenate([self.tokens[:, : self.length], input_ids], axis=1)
            # Nothing else asks for it, and unasked for its graph would grow with every token.
            mx.async_eval(input_ids)
        self.tokens = input_ids
        if attention_mask is None and self.valid is None:
            positions = mx.arange(self.length, self.length + length)[None]  # [1, length]
            if self.window is not None and self.length + length > self.window:
                return NewTokens(positions, long, self._mask(length), routing)
            return NewTokens(positions, long, "causal" if length > 1 else None, routing)
        real = mx.ones((batch, length)) if attention_mask is None else attention_mask
        real = real.astype(mx.bool_)
        kept = mx.ones((batch, self.length), mx.bool_) if self.valid is None else self.valid
        self.valid = mx.concatenate([kept[:, : self.length], real], axis=1)
        counted = mx.cumsum(real.astype(mx.int32), axis=1) - 1
        positions = mx.maximum(mx.array(before)[:, None] + counted, 0)  # [batch, length]
        return NewTokens(positions, long, self._mask(length), routing)

    def attend(
        self,
        layer: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: mx.array | str | None,
    ) -> mx.array:
        """Append one layer's keys and values, and attend over all that it has seen.

        Args:
            queries: `[batch, heads, length, head_dim]`.
            keys, values: `[batch, kv_heads, length, head_dim]`.
            mask: that `extend` gave.
        """
        return self.store.attend(layer, self.length, queries, keys, values, mask)

    def commit(self) -> None:
        """All layers have attended: the new columns count."""
        if self.tokens is not None:
            self.length = self.held = self.tokens.shape[1]
            self.row_lengths, self.long, self.adapters, self.loaded = self._pending

    def trim(self, length: int) -> None:
        """Forget every column from `length` on.

        The rows keep the rope factors and adapter that their keys were made with;
        `tokens_to_recompute` notices where the next tokens need others.
        """
        if length >= self.length:
            return
        self.length = length
        self.held = min(self.held, self.store.trim(length))
        if length == 0 or self.tokens is None:
            self.store.clear()
            self.tokens = self.valid = None
            self.row_lengths = self.long = self.adapters = self.loaded = ()
        elif self.valid is None:
            self.row_lengths = (length,) * len(self.row_lengths)
        else:
            self.row_lengths = _real_columns(self.valid[:, :length])

    def mark(self) -> None:
        """Note that a sequence may be cut about here later, as at the end of a prompt."""
        self.store.mark()

    def expect(
        self,
        lengths: Sequence[int],
        adapters: tuple[str | None, ...] = (),
        loaded: Sequence[str | None] = (),
    ) -> None:
        """Note what each row is known to come to, before long prompts are given in pieces.

        Args:
            lengths: tokens of each row.
            adapters: each row's, for a model that has some.
            loaded: each row's adapter of those that were loaded beside the model; the default one
                of all rows where nothing is given.
        """
        self.expected_lengths = tuple(lengths)
        self.expected_loaded = tuple(
            self.default_adapter if name == DEFAULT else name for name in loaded
        )

    def serves(self) -> bool:
        """Tell whether what is held was made with the rope factors and adapters expected now."""
        if not self.length or self.loaded != self._loaded_rows(len(self.loaded)):
            return False
        pairs = zip(self.long, self._long_rows(self.row_lengths), strict=True)
        return all(self.rope.serves(held, wanted) for held, wanted in pairs)

    def crossing(self, added: int) -> list[int]:
        """Find the rows that need other rope factors when so many tokens more have come to each."""
        long = self._long_rows([length + added for length in self.row_lengths])
        pairs = zip(self.long, long, strict=True)
        return [row for row, pair in enumerate(pairs) if not self.rope.goes_on(*pair, added)]

    def row(self, row: int, length: int) -> Cache:
        """View the first tokens of a row as a cache of its own.

        Keys and values are those of this cache until either is written to; `part` copies them.
        """
        assert self.tokens is not None
        columns = np.arange(self.length)
        if self.valid is not None:
            columns = np.flatnonzero(np.array(self.valid[row, : self.length]))
        columns = columns[:length]
        found = copy(self)
        found.store = self.store.row(row, columns)
        found.length = len(columns)
        found.tokens = self.tokens[row : row + 1][:, mx.array(columns)]
        found.held = found.store.trim(found.length)
        found.valid = None
        found.row_lengths = (found.length,)
        found.expected_length, found.expected_lengths = 0, ()
        found.long = chosen(self.long, [row])
        found.adapters = chosen(self.adapters, [row])
        found.loaded, found.expected_loaded = chosen(self.loaded, [row]), ()
        found.features = chosen(self.features, [row])
        return found

    def part(self) -> None:
        """Copy what is held into memory of its own, without room for more."""
        self.store.copy_columns(self.length)
        if self.tokens is not None:
            self.tokens = self.tokens[:, : self.length] + 0
            mx.eval(self.tokens)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows alone, in this order; the memory of the others is freed."""
        self.store.select(rows)
        index = mx.array(list(rows))
        self.tokens = None if self.tokens is None else self.tokens[index]
        self.valid = None if self.valid is None else self.valid[index]
        self.row_lengths = chosen(self.row_lengths, rows)
        self.expected_lengths = chosen(self.expected_lengths, rows)
        self.long = chosen(self.long, rows)
        self.adapters = chosen(self.adapters, rows)
        self.loaded = chosen(self.loaded, rows)
        self.expected_loaded = chosen(self.expected_loaded, rows)
        self._drop_padding()

    def _drop_padding(self) -> None:
        """Forget the first columns that are padding in every row."""
        if self.valid is None or self.tokens is None:
            return
        real = self.valid[:, : self.length]
        first: int = mx.argmax(real.any(axis=0)).item()  # type: ignore[assignment]
        if first:
            self.store.drop_columns(first)
            self.tokens = self.tokens[:, first : self.length]
            self.length -= first
            self.held = max(0, self.held - first)
        kept = real[:, first:]
        self.valid = None if kept.all().item() else kept

    def join(self, other: Cache) -> None:
        """Take the rows of another cache of the same model and kind below these; it is empty then.

        Columns end together: the rows of the shorter one are padded on the left.
        """
        assert self.tokens is not None
        assert other.tokens is not None
        assert (self.held, other.held) == (self.length, other.length)
        columns = max(self.length, other.length)
        self.store.join(self.length, other.store, other.length)
        caches = (self, other)
        valid = mx.concatenate([_aligned(cache._real(), columns) for cache in caches])
        self.valid = None if valid.all().item() else valid
        self.tokens = mx.concatenate(
            [_aligned(cache.tokens[:, : cache.length], columns) for cache in caches]  # type: ignore[index]
        )
        self.expected_lengths = tuple(
            expected
            for cache in caches
            for expected in cache.expected_lengths
            or (cache.expected_length,) * len(cache.row_lengths)
        )
        self.expected_loaded = tuple(
            name for cache in caches for name in cache._loaded_rows(len(cache.row_lengths))
        )
        self.row_lengths += other.row_lengths
        self.long += other.long
        self.adapters += other.adapters
        self.loaded += other.loaded
        self.length = self.held = columns
        other.trim(0)

    def _real(self) -> mx.array:
        """Tell real columns from padding, `[batch, columns]`."""
        if self.valid is None:
            return mx.ones((len(self.row_lengths), self.length), mx.bool_)
        return self.valid[:, : self.length]

    @property
    def state(self) -> list[mx.array]:
        """Arrays to evaluate so that no graph stays behind between passes."""
        return self.store.arrays

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take, and whatever media stand behind them."""
        return sum(array.nbytes for array in self.state)

    @property
    def kv_bits(self) -> int | None:
        """What keys and values are quantized to; None where they are not."""
        return self.store.kv_bits

    def _lengths_after(
        self, shape: tuple[int, int], attention_mask: mx.array | None
    ) -> tuple[int, ...]:
        batch, length = shape
        added = (length,) * batch if attention_mask is None else _real_columns(attention_mask)
        before = self.row_lengths or (0,) * batch
        return tuple(a + b for a, b in zip(before, added, strict=True))

    def _go_on(self, long: Sequence[int], added: int) -> bool:
        pairs = zip(self.long, long, strict=True)
        return all(self.rope.goes_on(held, wanted, added) for held, wanted in pairs)

    def _long_rows(self, row_lengths: Sequence[int]) -> tuple[int, ...]:
        expected = self.expected_lengths or (self.expected_length,) * len(row_lengths)
        pairs = zip(row_lengths, expected, strict=True)
        return tuple(self.rope.table(max(pair)) for pair in pairs)

    def _loaded_rows(self, batch: int) -> tuple[str | None, ...]:
        return self.expected_loaded or (self.default_adapter,) * batch

    def _route(self, rows: Rows) -> Routing | None:
        """Make the routing of rows; the last one again where they use the same adapters."""
        kinds = self._kinds(rows)
        if kinds != self._routed:
            self._routed = kinds
            self._routing = Routing(*kinds) if any(map(any, kinds)) else None
        return self._routing

    def _kinds(self, rows: Rows) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
        """Name what each row uses of the loaded adapters, and of the checkpoint's own."""
        return rows.loaded, rows.adapters

    def _mask(self, length: int) -> mx.array:
        """Make a mask `[batch or 1, 1, length, columns]`: causal, in the window, padding hidden.

        Every column may look at itself: a padded one would otherwise look at nothing, and its NaN
        would reach the real ones through a product with zero.
        """
        columns = mx.arange(self.length + length)
        queries = columns[self.length :, None]
        seen = (columns <= queries)[None]  # [1, length, columns]
        if self.window is not None:
            # Padding between a row's tokens is no part of its window.
            counted = columns[None] if self.valid is None else mx.cumsum(self.valid, axis=1)
            seen = seen & (counted[:, None] > counted[:, self.length :, None] - self.window)
        if self.valid is None:
            return seen[:, None]
        return ((seen & self.valid[:, None, :]) | (columns == queries))[:, None]


def with_past(
    past: tuple[mx.array, mx.array | None], input_ids: mx.array, attention_mask: mx.array | None
) -> tuple[mx.array, mx.array | None]:
    """Join what `tokens_to_recompute` gave with new tokens and their mask."""
    past_ids, past_mask = past
    if past_mask is not None or attention_mask is not None:
        past_mask = mx.ones(past_ids.shape) if past_mask is None else past_mask
        new_mask = mx.ones(input_ids.shape) if attention_mask is None else attention_mask
        attention_mask = mx.concatenate([past_mask, new_mask], axis=1)
    return mx.concatenate([past_ids, input_ids], axis=1), attention_mask


def chosen(values: tuple[T, ...], rows: Sequence[int]) -> tuple[T, ...]:
    """Select the values of these rows, of one value a row; empty where nothing has been fed."""
    return tuple(values[row] for row in rows) if values else ()


def _aligned(array: mx.array, columns: int) -> mx.array:
    """Pad `[batch, length]` on the left to so many columns, with zeros."""
    return mx.pad(array, [(0, 0), (columns - array.shape[1], 0)])


def _real_columns(mask: mx.array) -> tuple[int, ...]:
    """Count each row's columns that are not padding; waits for the mask's value."""
    return tuple(int(count) for count in mask.astype(mx.int32).sum(axis=1))
