"""Prompts that are prefilled together, in pieces, from what of each is known already."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from phimlx.generation.logprobs import score_prompt
from phimlx.generation.nonfinite import nonfinite_error
from phimlx.generation.placed_media import PlacedMedia
from phimlx.generation.prefill import prefill
from phimlx.generation.prefix_pool import Row
from phimlx.generation.prompt_cache import Prefix
from phimlx.generation.request import Request
from phimlx.machine.device import prefill_tokens
from phimlx.models.base import CausalLM
from phimlx.models.cache.kv import Cache
from phimlx.models.features import TEXT, Features

SHARED = 64  # tokens from which on a prompt waits for another that begins as it does


class Prompts:
    """Prompts of requests, each a row of one cache; a reply that has begun belongs to its prompt.

    Args:
        encoded: features of the only request's media; None where they are not known.

    Attributes:
        requests: whose they are.
        shared: whether others wait for each piece to end, so that pieces are to be shorter.
        kv: keys and values so far; None before the first piece.
        left: tokens that are still to be computed, of the row that has most.
    """

    def __init__(
        self, model: CausalLM, requests: Sequence[Request], encoded: Features | None = None
    ) -> None:
        self.requests = list(requests)
        self.kv: Cache | None = None
        self.left = max(len(request.tokens) for request in requests)
        self.shared = False
        self._model = model
        self._encoded = encoded
        self._rows: list[tuple[Cache, Prefix, PlacedMedia]] = []  # once they have begun
        self._pieces = self._compute()

    def begin(self) -> None:
        """Look up what is known of each; nothing where that is done.

        Raises:
            PromptError, GenerationError: where media do not fit.
        """
        if self._rows or self.kv is not None:
            return
        for request in self.requests:
            if not request.reply.tokens:
                request.start()
        self._rows = [self._begin_row(request) for request in self.requests]
        self.left = max(len(request.tokens) - prefix.computed for request, prefix in self._pairs())

    def gather(self, others: Sequence[Prompts]) -> list[Prompts]:
        """Take in those of other prompts that one piece can compute together with these.

        They are prompts of text that have not begun, all with a known prefix or all without one,
        for a row is padded to the longest. One that begins as these do goes on from them later.

        Returns:
            Those that were taken in.
        """
        taken: list[Prompts] = []
        if self.kv is not None or not self._is_text:
            return taken
        for other in others:
            rows = len(self.requests) + len(other.requests)
            if other.kv is not None or not other._is_text or rows * self.left > prefill_tokens():
                continue
            if _wants_scores(other.requests[0]) != _wants_scores(self.requests[0]):
                continue  # a prompt that is scored takes longer
            if other._waits_for(self):
                continue
            if self._has_prefix or rows * other.left <= prefill_tokens():
                try:
                    other.begin()
                except Exception as error:
                    other.fail(error)
                    continue
            longest = max(self.left, other.left)
            alike = other._rows and other._has_prefix == self._has_prefix
            if alike and rows * longest <= prefill_tokens():
                self.requests += other.requests
                self._rows += other._rows
                self.left = longest
                taken.append(other)
        return taken

    def fail(self, error: Exception) -> None:
        """End all requests."""
        for request in self.requests:
            request.fail(error)

    def step(self) -> mx.array | None:
        """Compute a piece; the hidden states of the last tokens, `[rows, 1, hidden]`, at the end.

        Raises:
            PromptError, GenerationError: where media do not fit.
        """
        return next(self._pieces)

    @property
    def done(self) -> bool:
        """Whether every request has finished."""
        return all(request.finished for request in self.requests)

    @property
    def rows(self) -> Iterator[Row]:
        """What has been computed, of requests with prompt caches."""
        if self.kv is not None and self.kv.row_lengths:
            for row, request in enumerate(self.requests):
                if request.cache is not None:
                    yield Row.of(request, request.cache, self.kv, row)

    @property
    def _is_text(self) -> bool:
        """Whether nothing can go wrong with media, which would end the others as well."""
        return all(request.media is None for request in self.requests)

    @property
    def _has_prefix(self) -> bool:
        return any(prefix.computed for _, prefix, _ in self._rows)

    def _waits_for(self, others: Prompts) -> bool:
        """Whether others are about to compute so much of this prompt that it is copied then."""
        own = self.requests[0]
        if self._rows or own.cache is None:
            return False
        for request, prefix in others._pairs():
            enough = prefix.computed + SHARED
            if request.cache is None or request.adapter != own.adapter:
                continue
            if len(own.tokens) > enough and own.tokens[:enough] == request.tokens[:enough]:
                return True
        return False

    def _pairs(self) -> Iterator[tuple[Request, Prefix]]:
        for request, (_, prefix, _) in zip(self.requests, self._rows, strict=True):
            yield request, prefix

    def _begin_row(self, request: Request) -> tuple[Cache, Prefix, PlacedMedia]:
        tokens = request.tokens
        media = PlacedMedia.place(tokens, request.media, self._model.placeholders)
        if request.cache is not None and self._encoded is None:
            prefix = request.cache.reuse(tokens, media, request.adapter)
            return request.cache.kv, prefix, media
        kv = self._model.make_cache(kv_bits=request.kv_bits)
        if request.cache is not None:
            request.cache.kv = kv
        kv.expect([len(tokens)], (media.adapter,), (request.adapter,))
        known = 0 if self._encoded is None else len(tokens)
        return kv, Prefix(0, known, self._encoded or TEXT), media

    def _compute(self) -> Iterator[mx.array | None]:
        self.begin()
        model, requests = self._model, self.requests
        prefixes = [prefix for _, prefix, _ in self._rows]
        features = [
            prefix.features.then(media.encode(model, prefix.encoded))
            for _, prefix, media in self._rows
        ]
        self.kv = kv = self._one_cache()
        self._rows = []
        before = kv.length
        pairs = zip(requests, prefixes, strict=True)
        ids, mask = _padded([request.tokens[prefix.computed :] for request, prefix in pairs])
        scored = any(map(_wants_scores, requests))
        outputs = None if scored else 1
        pieces = prefill(
            model,
            ids,
            kv,
            attention_mask=mask,
            features=features,
            outputs=outputs,
            shared=lambda: self.shared,
        )
        for hidden in pieces:
            self.left = ids.shape[1] - (kv.length - before)
            if scored:
                self._score(hidden, ids)
            rows = zip(requests, prefixes, kv.row_lengths, strict=True)
            for request, prefix, computed in rows:
                request.computed = computed
                request.reply.stats.forward_passes += 1
                if request.reply.tokens:
                    continue
                request.reply.stats.cached_tokens = prefix.computed
                if request.on_prefill is not None:
                    own = len(request.prompt) - prefix.computed
                    with request.guarded():
                        request.on_prefill(computed - prefix.computed, own)
            if self.left:
                yield None
                continue
            for request in requests:
                if request.max_tokens == 0:
                    request.end_prompt()
            yield hidden[:, -1:]

    def _score(self, hidden: mx.array, ids: np.ndarray) -> None:
        """Score the tokens of those prompts that ask for it, as far as a piece of them reaches.

        Args:
            hidden: `[rows, piece, hidden]`.
            ids: `[rows, length]`, all prompts, padded on the left.
        """
        length = ids.shape[1]
        done = length - self.left
        begin, end = done - hidden.shape[1], min(done, length - 1)  # what follows is the reply's
        for row, request in enumerate(self.requests):
            first = max(begin, length - len(request.prompt))
            if not _wants_scores(request) or request.finished or first >= end:
                continue
            states, tokens = hidden[row, first - begin : end - begin], ids[row, first + 1 : end + 1]
            scores = score_prompt(
                self._model.head, states, mx.array(tokens), request.prompt_logprobs or 0
            )
            if not all(score is None or math.isfinite(score.logprob) for score in scores):
                request.cancel(nonfinite_error(self._model, request.prompt))
            request.reply.prompt_logprobs += scores

    def _one_cache(self) -> Cache:
        """Put the rows of all prompts into one cache."""
        caches = [kv for kv, _, _ in self._rows]
        if len(caches) == 1:
            return caches[0]
        for request in self.requests:
            if request.cache is not None:
                request.cache.take()  # which otherwise would stay the cache of all
        if self._has_prefix:
            first, *others = caches
            for other in others:
                first.join(other)
            return first
        kv = self._model.make_cache(kv_bits=self.requests[0].kv_bits)
        adapters = tuple(media.adapter for _, _, media in self._rows)
        lengths = [len(request.tokens) for request in self.requests]
        kv.expect(lengths, adapters, [request.adapter for request in self.requests])
        return kv


def _wants_scores(request: Request) -> bool:
    """Whether the prompt is to be scored; where a reply has begun, it has been."""
    return request.prompt_logprobs is not None and not request.reply.tokens


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Prompts as the rows of one array, padded on the left, and 0 where they are padded."""
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int32)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, None if mask.all() else mask
