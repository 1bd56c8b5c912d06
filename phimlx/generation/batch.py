"""Requests that share forward passes: each is a row of one cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from phimlx.generation.nonfinite import nonfinite_error
from phimlx.generation.placed_media import PlacedMedia
from phimlx.generation.prefill import prefill
from phimlx.generation.prompt_cache import Prefix
from phimlx.generation.reply import Chunk
from phimlx.generation.request import Request
from phimlx.models.base import CausalLM
from phimlx.models.cache.kv import Cache
from phimlx.models.features import TEXT

CLEAR_EVERY = 256  # steps between handing freed buffers back to the system
NOT_FINITE = -1  # drawn in place of a token where logits are no numbers


class Batch:
    """A batch of requests that are prefilled and decoded together.

    A step is one forward pass: over a piece of the prompts, or over one token of every row. While a
    token is read the next one is already being computed. A row leaves when its request has
    finished.
    """

    def __init__(self, model: CausalLM, requests: Sequence[Request]) -> None:
        """`requests` that are several have no prompt caches."""
        self.requests = list(requests)
        self._model = model
        self._kv: Cache
        self._drawn: mx.array | None = None  # [rows], the next token of each
        self._prompts = self._feed_prompts()
        self._steps = 0

    @property
    def done(self) -> bool:
        """Whether every request has finished."""
        return all(request.finished for request in self.requests)

    def step(self) -> list[tuple[Request, Chunk]]:
        """Run one forward pass; the chunks that have come, in the order of the rows."""
        if self._drawn is None:
            next(self._prompts)
            return []
        self._drop_finished()
        drawn = self._drawn
        if any(request.remaining > 1 for request in self.requests):
            self._recompute_crossing_rows()
            hidden = self._model.hidden_states(drawn[:, None], self._kv, features=TEXT)
            self._draw(hidden[:, -1])
        chunks = []
        tokens: list[int] = drawn.tolist()  # type: ignore[assignment]
        for request, token in zip(self.requests, tokens, strict=True):
            if token == NOT_FINITE:
                request.cancel(nonfinite_error(self._model, request.tokens))
            else:
                chunks += [(request, chunk) for chunk in request.take(token)]
        self._drop_finished()
        self._steps += 1
        if self._steps % CLEAR_EVERY == 0:
            mx.clear_cache()
        return chunks

    def _feed_prompts(self) -> Iterator[None]:
        """Prefill, a piece between two yields; after the last one the first tokens are drawn."""
        model, requests = self._model, self.requests
        for request in requests:
            request.start()
        media = [PlacedMedia.place(r.prompt, r.media, model.placeholders) for r in requests]
        prefix = Prefix(0, 0, TEXT)
        if requests[0].cache is None:
            self._kv = model.make_cache()
            lengths = [len(request.prompt) for request in requests]
            self._kv.expect(lengths, tuple(placed.adapter for placed in media))
        else:
            prefix = requests[0].cache.reuse(requests[0].prompt, media[0])
            self._kv = requests[0].cache.kv
        features = [prefix.features.then(placed.encode(model, prefix.encoded)) for placed in media]
        ids, mask = _padded([request.prompt[prefix.computed :] for request in requests])
        length = ids.shape[1]
        done = 0
        for hidden in prefill(model, ids, self._kv, attention_mask=mask, features=features):
            done = min(length, done + hidden.shape[1])
            for request in requests:
                request.reply.stats.cached_tokens = prefix.computed
                if request.on_prefill is not None:
                    own = len(request.prompt) - prefix.computed
                    request.on_prefill(max(0, done - length + own), own)
            if done == length:
                self._draw(hidden[:, -1])
            else:
                self._note_pass()
            yield

    def _recompute_crossing_rows(self) -> None:
        """Compute a row of several anew where it comes to need other rope factors.

        Left to the model, all rows would be. One that is alone is.
        """
        if len(self.requests) == 1:
            return
        kv = self._kv
        for row in kv.crossing(1):
            alone = self._model.make_cache()
            alone.expect([kv.row_lengths[row] + 1], kv.adapters[row : row + 1])
            assert kv.tokens is not None
            here = slice(row, row + 1)
            ids = np.array(kv.tokens[here, : kv.length])
            mask = None if kv.valid is None else np.array(kv.valid[here, : kv.length])
            for _ in prefill(
                self._model, ids, alone, attention_mask=mask, features=kv.features[here]
            ):
                self.requests[row].reply.stats.forward_passes += 1
            kv.replace_row(row, alone)

    def _draw(self, hidden: mx.array) -> None:
        """Choose the next token of each row, given the hidden states of its last one.

        A placeholder token has no chance, since a reply has nothing to fill it with.

        Args:
            hidden: `[rows, hidden]`.
        """
        logits = self._model.head(hidden)  # [rows, vocab]
        finite = mx.isfinite(logits.max(axis=-1))  # [rows]; NaN and inf are never less than numbers
        if self._model.placeholders is not None:
            logits[:, mx.array(self._model.placeholders.tokens)] = -mx.inf
        samplers = [request.sampler for request in self.requests]
        if len(samplers) > 1 and all(sampler.sampling.is_greedy for sampler in samplers):
            tokens = mx.argmax(logits, axis=-1)
        else:
            rows = [sampler(logits[row : row + 1]) for row, sampler in enumerate(samplers)]
            tokens = mx.concatenate(rows)
        self._drawn = mx.where(finite, tokens.astype(mx.int32), NOT_FINITE)
        mx.async_eval(self._drawn)
        self._note_pass()

    def _note_pass(self) -> None:
        for request, computed in zip(self.requests, self._kv.row_lengths, strict=True):
            request.computed = computed
            request.reply.stats.forward_passes += 1

    def _drop_finished(self) -> None:
        """Let the rows go whose requests have finished."""
        rows = [row for row, request in enumerate(self.requests) if not request.finished]
        if len(rows) == len(self.requests):
            return
        self.requests = [self.requests[row] for row in rows]
        if rows and self._drawn is not None:
            self._kv.select(rows)
            self._drawn = self._drawn[mx.array(rows)]


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Prompts as the rows of one array, padded on the left, and 0 where they are padded."""
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int32)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, None if mask.all() else mask
