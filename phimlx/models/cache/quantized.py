"""Keys and values held in 8 or 4 bits, and attention over that form.

A long prompt attends over one layer's dequantized keys and values at a time, by the fused kernel,
which never holds all scores. One token, or the few of a draft, multiply the quantized form itself:
their scores are small, and reading it takes a quarter to a half of the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from phimlx.machine.kv_bits import check_kv_bits, kv_group_size
from phimlx.models.cache.store import Store, attention

# New tokens up to which the quantized form is multiplied. Each of their rows reads it again, which
# costs as much as dequantizing at some ten tokens; MLX too computes attention vector by vector up
# to here.
FEW = 8

# MLX's Metal kernel for products with values computes channels 64 at a time, and leaves out the
# rest of a head that is not a multiple (mlx#4250).
WIDTH = 64

Parts = tuple[mx.array, mx.array, mx.array]
"""Packed numbers, scales and biases."""


class QuantizedStore(Store):
    """Keys and values, each as packed numbers, scales and biases (`mx.quantize`).

    Groups are along the channels of one head, 64 at a time where they divide it and else 32, so
    each token's numbers are its own: rows, trimmed columns and passes of any length hold the same.
    """

    def __init__(self, num_layers: int, kv_bits: int, head_dim: int) -> None:
        """Make an empty store.

        Raises:
            GenerationError: for bits other than 8 and 4, or heads that no group divides.
        """
        super().__init__(num_layers)
        check_kv_bits(kv_bits, head_dim)
        self.kv_bits = kv_bits
        group_size = kv_group_size(head_dim)
        assert group_size is not None
        self._bits, self._group_size = kv_bits, group_size
        # MLX's CUDA kernels take whole buffers only, not the columns that are written.
        self._multiplies = head_dim % WIDTH == 0 and not mx.cuda.is_available()
        self._last: mx.array | None = None  # the attention of the last layer

    def append(
        self, layer: int, begin: int, keys: mx.array, values: mx.array
    ) -> QuantizedKeysValues:
        """As in `Store`; the new keys and values are attended to as they are held, too."""
        new = [
            part
            for array in (keys, values)
            for part in mx.quantize(array, self._group_size, self._bits)
        ]
        held = self.write(layer, begin, new)
        return QuantizedKeysValues(self, (held[0], held[1], held[2]), (held[3], held[4], held[5]))

    def dequantized(self, parts: Parts) -> mx.array:
        """Unpack keys or values."""
        packed, scales, biases = parts
        return mx.dequantize(packed, scales, biases, self._group_size, self._bits)

    def multiplies(self, queries: mx.array) -> bool:
        """Whether queries attend to the quantized form itself."""
        return self._multiplies and queries.shape[2] <= FEW

    def multiply(
        self, queries: mx.array, keys: Parts, values: Parts, mask: mx.array | str | None
    ) -> mx.array:
        """Attend by products with the quantized form, in float32 as the fused kernel does."""
        batch, heads, length, head_dim = queries.shape
        kv_heads, columns = keys[0].shape[1:3]
        scaled = queries.astype(mx.float32) * head_dim**-0.5
        grouped = scaled.reshape(batch, kv_heads, -1, length, head_dim)
        scores = self._product(grouped, keys, transpose=True)  # [batch, kv, group, length, columns]
        if isinstance(mask, str):
            mask = mx.tri(length, columns, columns - length, mx.bool_)[None, None]
        if mask is not None:
            scores = mx.where(mask[:, :, None], scores, -mx.inf)
        out = self._product(mx.softmax(scores, axis=-1), values, transpose=False)
        self._last = None
        return out.reshape(batch, heads, length, head_dim).astype(queries.dtype)

    def _product(self, x: mx.array, parts: Parts, *, transpose: bool) -> mx.array:
        packed, scales, biases = (part[:, :, None] for part in parts)  # for all heads of a group
        return mx.quantized_matmul(
            x, packed, scales, biases, transpose, self._group_size, self._bits
        )

    def in_turn(self, out: mx.array) -> mx.array:
        """Start a layer, once the one before is done.

        Left to itself a GPU is given several layers to do, and their dequantized keys and values
        are there together.
        """
        if self._last is not None:
            mx.eval(self._last)
        mx.async_eval(out)
        self._last = out
        return out


@dataclass(frozen=True)
class QuantizedKeysValues:
    """What a layer holds quantized, its keys and its values."""

    store: QuantizedStore
    keys: Parts
    values: Parts

    @property
    def columns(self) -> int:
        return self.keys[0].shape[2]

    def heads(self, keys: slice, values: slice) -> QuantizedKeysValues:
        """As in `Held`."""
        return QuantizedKeysValues(self.store, _heads(self.keys, keys), _heads(self.values, values))

    def attend(self, queries: mx.array, mask: mx.array | str | None) -> mx.array:
        """As in `Held`."""
        if self.store.multiplies(queries):
            return self.store.multiply(queries, self.keys, self.values, mask)
        keys, values = map(self.store.dequantized, (self.keys, self.values))
        return self.store.in_turn(attention(queries, keys, values, mask))


def _heads(parts: Parts, heads: slice) -> Parts:
    packed, scales, biases = parts
    return packed[:, heads], scales[:, heads], biases[:, heads]


def make_store(num_layers: int, head_dim: int, kv_bits: int | None = None) -> Store:
    """Make an empty store of keys and values.

    Args:
        kv_bits: 8 or 4; as they come where None.

    Raises:
        GenerationError: where heads of that size cannot be quantized so.
    """
    if kv_bits is None:
        return Store(num_layers)
    return QuantizedStore(num_layers, kv_bits, head_dim)
