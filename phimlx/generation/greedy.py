"""The likeliest reply to each of many prompts, several at a time.

Knows a model and token ids; knows nothing of text, sampling or media.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import mlx.core as mx

from phimlx.generation.engine import PREFILL_TOKENS
from phimlx.models.base import CausalLM

Advance = Callable[[int], object]


def greedy(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    ends: Collection[int],
    batch_size: int = 8,
    advance: Advance = lambda count: None,
) -> list[list[int]]:
    """Each prompt's reply, the token that ends it included.

    Args:
        prompts: at least one token each.
        max_tokens: of a reply.
        ends: tokens that end one.
        batch_size: prompts that are answered together.
        advance: called with the number of prompts that have been answered.
    """
    replies: list[list[int]] = [[] for _ in prompts]
    for group in _groups(model, prompts, batch_size):
        for number, reply in zip(
            group, _reply(model, [prompts[i] for i in group], max_tokens, ends), strict=True
        ):
            replies[number] = reply
        advance(len(group))
        mx.clear_cache()
    return replies


def _groups(model: CausalLM, prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Numbers of prompts of about equal length, longest first, on one side of the LongRoPE step."""
    is_long = model.config.rope.is_long
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    group: list[int] = []
    for number in order:
        same = not group or is_long(len(prompts[group[0]])) == is_long(len(prompts[number]))
        if len(group) == size or not same:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _reply(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    ends: Collection[int],
) -> list[list[int]]:
    length = max(map(len, prompts))
    padded = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    real = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids, mask = mx.array(padded), mx.array(real)  # [batch, length]
    cache = model.make_cache(expected_length=length)
    hidden = mx.array(0)
    for begin in range(0, length, PREFILL_TOKENS):
        here = slice(begin, begin + PREFILL_TOKENS)
        hidden = model.hidden_states(ids[:, here], cache, mask[:, here])[:, -1]
        mx.eval(hidden, cache.state)
    replies: list[list[int]] = [[] for _ in prompts]
    alive = [True] * len(prompts)
    for count in range(1, max_tokens + 1):
        tokens: list[int] = mx.argmax(_logits(model, hidden), axis=-1).tolist()  # type: ignore[assignment]
        for row, token in enumerate(tokens):
            if alive[row]:
                replies[row].append(token)
                alive[row] = token not in ends
        if count == max_tokens or not any(alive):
            break
        fed = mx.array(tokens)[:, None]
        mask = mx.array(alive)[:, None].astype(mx.int32)
        hidden = model.hidden_states(fed, cache, mask)[:, -1]
    return replies


def _logits(model: CausalLM, hidden: mx.array) -> mx.array:
    """Logits `[batch, vocab]`; a slot for media has no chance."""
    logits = model.head(hidden)
    if model.placeholders is not None:
        logits[:, mx.array(model.placeholders.tokens)] = -mx.inf
    return logits
