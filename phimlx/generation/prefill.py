"""Prompts through a model in pieces, which bounds the memory that they take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from phimlx.machine.device import prefill_tokens
from phimlx.models.base import CausalLM
from phimlx.models.cache.kv import Cache
from phimlx.models.features import TEXT, Features


def prefill(
    model: CausalLM,
    input_ids: np.ndarray,
    cache: Cache,
    *,
    attention_mask: np.ndarray | None = None,
    features: Sequence[Features] = (),
    size: int | None = None,
    outputs: int | None = None,
) -> Iterator[mx.array]:
    """Feed prompts, and yield the hidden states of each piece, `[batch, up to size, hidden]`.

    Args:
        input_ids: `[batch, length]`.
        cache: holds what came before; `expect` tells it what is to come.
        attention_mask: `[batch, length]`, 0 at padding; None where there is none.
        features: each row's, for its placeholder tokens; none where no row has such.
        size: tokens of a piece; as the device likes it where None.
        outputs: of how many tokens of a piece, counted from its last, they are wanted; None for
            all.
    """
    size = size or prefill_tokens()
    length = input_ids.shape[1]
    used = [(0, 0)] * len(features)
    for begin in range(0, length, size):
        piece = input_ids[:, begin : begin + size]
        mask = None if attention_mask is None else mx.array(attention_mask[:, begin : begin + size])
        given = TEXT
        if any(any(row.counts) for row in features) and model.placeholders is not None:
            counts = model.placeholders.count(piece)
            ends = [(a + c, b + d) for (a, b), (c, d) in zip(used, counts, strict=True)]
            for row, start, end in zip(features, used, ends, strict=True):
                given = given.then(row.between(start, end))
            used = ends
        hidden = model.hidden_states(mx.array(piece), cache, mask, features=given, outputs=outputs)
        cache.mark()
        if begin + size < length:
            mx.eval(cache.state)
            mx.clear_cache()
        yield hidden
