"""Rows of an embedding or an output head that stand in place of its own, for some tokens.

The layer below may be quantized: nothing is written into it.
Source: peft `tuners/trainable_tokens/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np


@dataclass(frozen=True)
class TokenRows:
    """Rows for some tokens.

    Attributes:
        tokens: no two alike.
        values: `[tokens, hidden]`.
    """

    tokens: tuple[int, ...]
    values: mx.array

    def merged(self, weight: mx.array, first: int = 0) -> mx.array:
        """Put them into rows of a weight, from number `first` on; float32."""
        last = first + weight.shape[0]
        here = [place for place, token in enumerate(self.tokens) if first <= token < last]
        merged = weight.astype(mx.float32)
        if here:
            places = mx.array([self.tokens[place] - first for place in here])
            merged[places] = self.values[mx.array(here)].astype(mx.float32)
        return merged


class RowsEmbedding(nn.Module):
    """An embedding some of whose rows are others'."""

    def __init__(self, base_layer: nn.Module, rows: TokenRows) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.token_rows = rows.values
        places = np.full(base_layer.weight.shape[0], -1, np.int32)
        places[list(rows.tokens)] = np.arange(len(rows.tokens))
        self._places = mx.array(places)  # [vocab], -1 for tokens that keep their row

    def __call__(self, ids: mx.array) -> mx.array:
        """`[batch, length]` tokens to `[batch, length, hidden]`."""
        y = self.base_layer(ids)
        places = self._places[ids]
        own = self.token_rows[mx.maximum(places, 0)].astype(y.dtype)
        return mx.where(places[..., None] >= 0, own, y)


class RowsLinear(nn.Module):
    """An output head without bias, some of whose rows are others'."""

    def __init__(self, base_layer: nn.Module, rows: TokenRows) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.token_rows = rows.values
        self._tokens = mx.array(rows.tokens)

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., hidden]` to logits `[..., vocab]`."""
        y = self.base_layer(x)
        y[..., self._tokens] = (x @ self.token_rows.T.astype(x.dtype)).astype(y.dtype)
        return y
