"""Buffers of keys and values, layer by layer, and attention over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np


class Form(NamedTuple):
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: mx.Dtype


class Held(Protocol):
    """Keys and values of one layer, as far as they have been written, for queries to attend to."""

    @property
    def columns(self) -> int:
        """How many tokens' they are."""

    def heads(self, keys: slice, values: slice) -> Held:
        """Take the keys of some heads, with values of as many."""

    def attend(self, queries: mx.array, mask: mx.array | str | None) -> mx.array:
        """Attend to them; arguments and result as of `attention`."""


class KeysValues(NamedTuple):
    """What a layer holds as it comes, `[batch, kv_heads, columns, head_dim]`."""

    keys: mx.array
    values: mx.array

    @property
    def columns(self) -> int:
        return self.keys.shape[2]

    def heads(self, keys: slice, values: slice) -> KeysValues:
        """As in `Held`."""
        return KeysValues(self.keys[:, keys], self.values[:, values])

    def attend(self, queries: mx.array, mask: mx.array | str | None) -> mx.array:
        """As in `Held`."""
        return attention(queries, self.keys, self.values, mask)


class Store:
    """Keys and values of all layers, in buffers that have a column for each token.

    Attributes:
        kv_bits: what keys and values are quantized to; None where they are held as they come.
        layers: each layer's buffers, `[batch, kv_heads, columns, …]`; none before it is written.
    """

    step = 256  # columns by which the buffers grow
    kv_bits: int | None = None

    def __init__(self, num_layers: int) -> None:
        self.layers: list[list[mx.array]] = [[] for _ in range(num_layers)]
        self._columns = 0  # of every buffer

    def attend(
        self,
        layer: int,
        begin: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: mx.array | str | None,
    ) -> mx.array:
        """Write one layer's new keys and values, and attend over all that it then holds.

        Args:
            begin: columns before the new ones, which are kept.
            queries: `[batch, heads, length, head_dim]`.
            keys, values: `[batch, kv_heads, length, head_dim]`.
            mask: for `mx.fast.scaled_dot_product_attention`.

        Returns:
            `[batch, heads, length, head_dim]`, in the dtype of the queries.
        """
        return self.append(layer, begin, keys, values).attend(queries, mask)

    def append(self, layer: int, begin: int, keys: mx.array, values: mx.array) -> Held:
        """Write one layer's new keys and values; what it then holds, these included."""
        return KeysValues(*self.write(layer, begin, [keys, values]))

    def write(self, layer: int, begin: int, new: Sequence[mx.array]) -> list[mx.array]:
        """Write after the first `begin` columns, for which `reserve` has made room.

        Args:
            new: for each of the layer's buffers `[batch, kv_heads, length, …]`.

        Returns:
            Every buffer up to the end of what is new.
        """
        end = begin + new[0].shape[2]
        if not self.layers[layer]:
            self.layers[layer] = [_empty(array, self._columns) for array in new]
        buffers = self.layers[layer]
        for buffer, array in zip(buffers, new, strict=True):
            buffer[..., begin:end, :] = array
        return [buffer[..., :end, :] for buffer in buffers]

    def reserve(self, columns: int, kept: int) -> None:
        """Make room for so many columns, and keep the first `kept`.

        One layer is copied after the other, each evaluated before the next, so that there are
        never two copies of all. Buffers grow by an eighth at least, so that a long row is not
        copied again after every `step` tokens.
        """
        if columns <= self._columns:
            return
        columns = max(columns, kept + kept // 8)
        self._columns = -(-columns // self.step) * self.step
        for buffers in self.layers:
            for index, buffer in enumerate(buffers):
                more = _empty(buffer, self._columns - kept)
                buffers[index] = mx.concatenate([buffer[..., :kept, :], more], axis=2)
                mx.eval(buffers[index])

    def forms(self, columns: int) -> dict[str, Form]:
        """List the arrays that a row of so many columns consists of, by name.

        They are told from those that are held: a token must have been written, if never computed.
        """
        return {
            name: Form((1, array.shape[1], columns, *array.shape[3:]), array.dtype)
            for name, array in self.parts(0)
        }

    def parts(self, columns: int) -> Iterator[tuple[str, mx.array]]:
        """List the arrays of the first columns, in the order of `forms`; none is copied."""
        for layer, buffers in enumerate(self.layers):
            for place, buffer in enumerate(buffers):
                yield f"layers.{layer}.{place}", buffer[:, :, :columns]

    def restore(self, parts: Mapping[str, mx.array], columns: int) -> None:
        """Hold a row's arrays, whose forms have been checked, in place of what is held.

        Raises:
            CacheError: where what they hold is no sense.
        """
        self.layers = [[] for _ in self.layers]
        for name, array in parts.items():
            self.layers[int(name.split(".")[1])].append(array)
        self._columns = columns

    def trim(self, columns: int) -> int:
        """Forget what is behind so many columns; the number of columns that can be gone on from.

        These are fewer where something that is kept cannot go back as far and no farther.
        """
        return columns

    def mark(self) -> None:
        """Keep what is needed to come back to about here; nothing where every column is held."""

    def clear(self) -> None:
        """Free all buffers."""
        self.layers = [[] for _ in self.layers]
        self._columns = 0

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows alone, in this order; layer by layer, as in `reserve`."""
        chosen = mx.array(list(rows))
        for buffers in self.layers:
            for index, buffer in enumerate(buffers):
                buffers[index] = buffer[chosen]
                mx.eval(buffers[index])

    def row(self, row: int, columns: np.ndarray) -> Store:
        """View these columns of a row as a store of its own; `copy_columns` parts it from this.

        Args:
            columns: their indices, rising.
        """
        found = copy(self)
        consecutive = len(columns) and columns[-1] - columns[0] + 1 == len(columns)
        chosen = slice(int(columns[0]), int(columns[-1]) + 1) if consecutive else mx.array(columns)
        found.layers = [
            [buffer[row : row + 1][:, :, chosen] for buffer in buffers] for buffers in self.layers
        ]
        found._columns = len(columns)
        return found

    def copy_columns(self, columns: int) -> None:
        """Hold the first columns alone, in memory of their own; layer by layer."""
        for buffers in self.layers:
            for index, buffer in enumerate(buffers):
                # An update of a whole array is the update itself: a view, which holds all it is of.
                buffers[index] = mx.contiguous(buffer[..., :columns, :])
                mx.eval(buffers[index])
        self._columns = columns

    def drop_columns(self, first: int) -> None:
        """Forget the first columns; layer by layer."""
        self._columns -= first
        for buffers in self.layers:
            for index, buffer in enumerate(buffers):
                buffers[index] = buffer[:, :, first:]
                mx.eval(buffers[index])

    def join(self, length: int, other: Store, other_length: int) -> None:
        """Take the rows of a store of the same kind below these, layer by layer; it is empty then.

        Columns end together: in the shorter one empty ones come first.

        Args:
            length, other_length: columns that count here and there.
        """
        end = max(length, other_length)
        self._columns = (end // self.step + 1) * self.step
        for buffers, others in zip(self.layers, other.layers, strict=True):
            for index, buffer in enumerate(buffers):
                pair = ((buffer, length), (others[index], other_length))
                buffers[index] = mx.concatenate(
                    [_moved(array, count, end, self._columns) for array, count in pair]
                )
                mx.eval(buffers[index])
            others.clear()
        other.clear()

    @property
    def columns(self) -> int:
        """How many the buffers have room for."""
        return self._columns

    @property
    def arrays(self) -> list[mx.array]:
        """All buffers."""
        return [buffer for buffers in self.layers for buffer in buffers]


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str | None
) -> mx.array:
    """Scaled dot-product attention in the dtype of the queries, `[batch, heads, length, head_dim]`.

    Args:
        keys, values: `[batch, kv_heads, columns, head_dim]`.
        mask: for `mx.fast.scaled_dot_product_attention`.
    """
    return mx.fast.scaled_dot_product_attention(
        queries,
        keys.astype(queries.dtype),
        values.astype(queries.dtype),
        scale=queries.shape[-1] ** -0.5,
        mask=mask,
    )


def _moved(array: mx.array, length: int, end: int, columns: int) -> mx.array:
    """Copy the first `length` columns into a buffer of so many, where they end at `end`."""
    copy = _empty(array, columns)
    copy[..., end - length : end, :] = array[..., :length, :]
    return copy


def _empty(like: mx.array, columns: int) -> mx.array:
    batch, heads, _, width = like.shape
    return mx.zeros((batch, heads, columns, width), like.dtype)
