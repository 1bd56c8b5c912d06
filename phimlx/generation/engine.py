"""Prompt tokens -> reply tokens: prefill in pieces, then decoding one token ahead of the reader.

Knows a model, its cache and a sampler; knows nothing of text, stop strings or templates.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import takewhile

import mlx.core as mx

from phimlx.generation.sampling import Sampler
from phimlx.models.phi3 import Phi3ForCausalLM

PREFILL_TOKENS = 2048  # tokens of a prompt in one forward pass, which bounds working memory
CLEAR_EVERY = 256  # tokens between handing freed buffers back to the system


class PromptCache:
    """Keys and values kept from one call to the next, with the tokens that they belong to."""

    def __init__(self, model: Phi3ForCausalLM) -> None:
        self.kv = model.make_cache()
        self.tokens: list[int] = []

    def reuse(self, prompt: list[int]) -> int:
        """Keep what the prompt shares with the tokens here; return how many tokens that is.

        The last token of a prompt is always computed, since its logits are wanted. Nothing is kept
        where the prompt needs the other LongRoPE table.
        """
        pairs = zip(self.tokens, prompt[:-1], strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.kv.expected_length = len(prompt)
        if self.kv.long != (self.kv.rope.is_long(len(prompt)),):
            shared = 0
        self.keep(self.tokens[:shared])
        return shared

    def keep(self, tokens: list[int]) -> None:
        """`tokens` are what was fed; those count whose keys and values are complete."""
        self.kv.trim(len(tokens))
        self.tokens = tokens[: self.kv.length]


def generate_tokens(
    model: Phi3ForCausalLM,
    prompt: list[int],
    sampler: Sampler,
    max_tokens: int,
    cache: PromptCache,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Generator[int]:
    """Yield up to `max_tokens` tokens that follow the prompt.

    While one token is read the next is already being computed. However the reader stops, the cache
    is left holding what has been computed, ready for the next prompt.

    Args:
        prompt: at least one token.
        cache: what earlier calls left; what the prompt shares with it is not computed again.
        on_prefill: called with the tokens computed and the tokens to compute, after each piece.
    """
    tokens = list(prompt)
    try:
        with _wired_memory():
            start = cache.reuse(tokens)
            rest = mx.array([prompt[start:]])  # [1, length]
            length = rest.shape[1]
            for begin in range(0, length, PREFILL_TOKENS):
                hidden = model.hidden_states(rest[:, begin : begin + PREFILL_TOKENS], cache.kv)
                if begin + PREFILL_TOKENS < length:
                    mx.eval(cache.kv.state)
                    mx.clear_cache()
                if on_prefill is not None:
                    on_prefill(min(begin + PREFILL_TOKENS, length), length)
            token = sampler(model.head(hidden[:, -1]))  # [1]
            mx.async_eval(token)
            for count in range(1, max_tokens + 1):
                current = token
                if count < max_tokens:
                    token = sampler(model(current[:, None], cache.kv)[:, -1])
                    mx.async_eval(token)
                tokens.append(current.item())  # type: ignore[arg-type]
                yield tokens[-1]
                if count % CLEAR_EVERY == 0:
                    mx.clear_cache()
    finally:
        cache.keep(tokens)


@contextmanager
def _wired_memory() -> Iterator[None]:
    """Keep the weights resident while a reply is generated, where the system can (Metal)."""
    if not mx.metal.is_available():
        yield
        return
    limit = mx.device_info()["max_recommended_working_set_size"]
    before = mx.set_wired_limit(int(limit))
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)
