"""Prompts through a model in pieces, which bounds the memory that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from phimlx.machine.device import prefill_tokens
from phimlx.models.base import CausalLM
from phimlx.models.cache.kv import Cache
from phimlx.models.features import TEXT, Features

SHARES = 4  # pieces in place of one, while others wait: shorter ones would not fill a GPU


def prefill(
    model: CausalLM,
    input_ids: np.ndarray,
    cache: Cache,
    *,
    attention_mask: np.ndarray | None = None,
    features: Sequence[Features] = (),
    size: int | None = None,
    shared: Callable[[], bool] = lambda: False,
    outputs: int | None = None,
) -> Iterator[mx.array]:
    """Feed prompts, and yield the hidden states of each piece, `[batch, up to size, hidden]`.

    Args:
        input_ids: `[batch, length]`.
        cache: holds what came before; `expect` tells it what is to come.
        attention_mask: `[batch, length]`, 0 at padding; None where there is none.
        features: each row's, for its placeholder tokens; none where no row has such.
        size: tokens of a piece; as the device likes it where None.
        shared: whether others wait for the next piece, which then is shorter.
        outputs: of how many tokens of a piece, counted from its last, they are wanted; None for
            all.
    """
    length = input_ids.shape[1]
    used = [(0, 0)] * len(features)
    end = 0
    while end < length:
        begin, end = end, end + (size or piece_tokens(shared()))
        piece = input_ids[:, begin:end]
        mask = None if attention_mask is None else mx.array(attention_mask[:, begin:end])
        given = TEXT
        if any(any(row.counts) for row in features) and model.placeholders is not None:
            counts = model.placeholders.count(piece)
            then = [(a + c, b + d) for (a, b), (c, d) in zip(used, counts, strict=True)]
            for row, first, last in zip(features, used, then, strict=True):
                given = given.then(row.between(first, last))
            used = then
        hidden = model.hidden_states(mx.array(piece), cache, mask, features=given, outputs=outputs)
        cache.mark()
        if end < length:
            mx.eval(cache.state)
            mx.clear_cache()
        yield hidden


def piece_tokens(shared: bool) -> int:
    """Tokens of a piece, where others wait for it or not."""
    return max(1, prefill_tokens() // SHARES) if shared else prefill_tokens()
