"""Requests that share forward passes: each is a row of one cache."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import mlx.core as mx
import numpy as np

from phimlx.generation.logprobs import RowLogprobs, TokenLogprob, score_prompt, score_rows
from phimlx.generation.nonfinite import nonfinite_error
from phimlx.generation.placed_media import PlacedMedia
from phimlx.generation.prefill import prefill
from phimlx.generation.prompt_cache import Prefix
from phimlx.generation.reply import Chunk
from phimlx.generation.request import Request
from phimlx.generation.speculation import PromptLookup
from phimlx.models.base import CausalLM
from phimlx.models.cache.kv import Cache
from phimlx.models.features import TEXT

CLEAR_EVERY = 256  # steps between handing freed buffers back to the system
NOT_FINITE = -1  # drawn in place of a token where logits are no numbers

Drawn = tuple[int, TokenLogprob | None]


class Batch:
    """A batch of requests that are prefilled and decoded together.

    A step is one forward pass at most: over a piece of the prompts, or over one token of every
    row. While a token is read the next one is already being computed; where rows are held to
    grammars only the pass is, and the token is chosen when it is known what may come. A row leaves
    when its request has finished.

    The pass of a row that is alone may go over drafted tokens as well, where the text repeats
    itself; those that the sampler draws too are the tokens of the next steps. The next pass then
    waits until it is known what to draft.

    Args:
        requests: without prompt caches where they are several.
        pass_cost: of a pass over so many tokens, relative to a pass over one.

    Attributes:
        requests: those that have not left.
        may_draft: whether a row that is alone may draft tokens.
    """

    def __init__(
        self, model: CausalLM, requests: Sequence[Request], pass_cost: Callable[[int], float]
    ) -> None:
        self.requests = list(requests)
        self.may_draft = True
        self._first = self.requests[0]
        self._model = model
        self._pass_cost = pass_cost
        self._kv: Cache
        self._drawn: mx.array | None = None  # [rows, 1], or of one row [1, 1 + drafted]
        self._draft: list[int] = []  # what was fed to draw `_drawn`, behind the last known token
        self._logprobs: list[RowLogprobs | None] = []  # of `_drawn`, each row's
        self._ready: deque[Drawn] = deque()  # the row's next tokens
        self._lookup: PromptLookup | None = None
        self._prompts = self._feed_prompts()
        self._steps = 0

    @property
    def done(self) -> bool:
        """Whether every request has finished."""
        return all(request.finished for request in self.requests)

    @property
    def prefilled(self) -> bool:
        """Whether the prompts are computed."""
        return self._drawn is not None

    @property
    def can_be_joined(self) -> bool:
        """Whether no row has drafted tokens or such that are known and not taken."""
        return not self._draft and not self._ready

    def join(self, other: Batch) -> None:
        """Take the rows of another batch, which has been prefilled, below these."""
        assert self._drawn is not None
        assert other._drawn is not None
        self.drop_finished()
        other.drop_finished()
        self._kv.join(other._kv)
        self._drawn = mx.concatenate([self._drawn, other._drawn])
        self._logprobs += other._logprobs
        self.requests += other.requests
        self._lookup = None

    def step(self) -> list[tuple[Request, Chunk]]:
        """Run one forward pass; the chunks that have come, in the order of the rows."""
        if self._drawn is None:
            if not self.done:
                next(self._prompts)
            return []
        self.drop_finished()
        if not self.requests:
            return []
        chunks = []
        drawn = self._next_tokens(self._drawn)
        for request, (token, logprob) in zip(self.requests, drawn, strict=True):
            if token == NOT_FINITE:
                request.cancel(nonfinite_error(self._model, request.tokens))
                continue
            chunks += [(request, chunk) for chunk in request.take(token, logprob)]
            if request.constraint is not None and request.constraint.error is not None:
                request.cancel(request.constraint.error)
        self.drop_finished()
        self._steps += 1
        if self._steps % CLEAR_EVERY == 0:
            mx.clear_cache()
        return chunks

    def close(self) -> None:
        """Leave in the prompt cache, where there is one, the tokens of prompt and reply alone."""
        request = self._first
        if request.cache is not None and self._drawn is not None:
            self._kv.trim(len(request.prompt) + len(request.reply.tokens))
            self._kv.trim(self._kv.held)
            request.computed = self._kv.length

    def _next_tokens(self, drawn: mx.array) -> list[Drawn]:
        """Give the next token of each row, and its log-probability where the row asks for it."""
        if self._ready:
            return [self._ready.popleft()]
        logprobs = self._logprobs  # the pass that is fed below has others
        lookup = self._prepare_lookup()
        waits = bool(self._draft) or (lookup is not None and bool(lookup.draft()))
        logits: mx.array | None = None
        if not waits and any(request.remaining > 1 for request in self.requests):
            self._recompute_crossing_rows()
            logits = self._run_pass(drawn)
            if not self._constrained:
                self._draw(logits)
        # Indexing first would be one more operation, which waits behind the pass just begun.
        rows: list[list[int]] = drawn.tolist()  # type: ignore[assignment]
        known = [row[:1] for row in rows]
        if len(rows) == 1:
            known = [self._verify(rows[0])]
        for request, found in zip(self.requests, known, strict=True):
            if request.constraint is not None and NOT_FINITE not in found:
                request.constraint.advance(found)
        if logits is not None and self._constrained:
            self._draw(logits)
        if len(rows) > 1:
            return [(row[0], _told(own, 0)) for row, own in zip(rows, logprobs, strict=True)]
        (tokens,) = known
        if lookup is not None:
            lookup.extend(tokens)
        if waits:
            self._feed_draft(tokens, lookup)
        told = [(token, _told(logprobs[0], place)) for place, token in enumerate(tokens)]
        self._ready.extend(told[1:])
        return told[:1]

    def _prepare_lookup(self) -> PromptLookup | None:
        """The lookup of a row that is alone and may draft, with all of its tokens."""
        request = self.requests[0]
        if len(self.requests) > 1 or not self.may_draft or not request.prompt_lookup:
            return None
        known = len(request.prompt) + len(request.reply.tokens)
        if self._lookup is None:
            media = self._model.placeholders
            never = () if media is None else media.tokens
            self._lookup = PromptLookup(request.tokens, self._pass_cost, never, request.stop_tokens)
        elif len(self._lookup) < known:
            self._lookup.extend(request.tokens[len(self._lookup) :])
        return self._lookup

    def _verify(self, tokens: list[int]) -> list[int]:
        """Find those of the drawn tokens that the row's last pass gave: as many as were drafted
        too, and the one behind them. The cache and the sampler forget the rest of the draft."""
        draft = self._draft
        if not draft:
            return tokens[:1]
        pairs = zip(tokens, draft, strict=False)
        accepted = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        request = self.requests[0]
        self._kv.trim(self._kv.length - len(draft) + accepted)
        request.computed = self._kv.length
        request.sampler.keep(accepted + 1)
        request.reply.stats.drafted_tokens += len(draft)
        request.reply.stats.accepted_tokens += accepted
        self._draft = []
        return tokens[: accepted + 1]

    def _feed_draft(self, tokens: list[int], lookup: PromptLookup | None) -> None:
        """Run the pass after `tokens`, which are known but not taken yet, with a draft behind.

        A draft does not reach over the LongRoPE step: there the pass over one token alone is what
        the row would have been given.
        """
        request = self.requests[0]
        room = request.remaining - len(tokens)
        if room < 1 or tokens[-1] == NOT_FINITE:
            return
        ends = not request.stop_tokens.isdisjoint(tokens)  # its keys and values are for later turns
        draft = [] if ends or lookup is None else lookup.draft(room - 1)
        if request.constraint is not None:
            draft = request.constraint.fitting(draft)
        while draft and self._kv.crossing(1 + len(draft)):
            draft.pop()
        logits = self._run_pass(mx.array([[tokens[-1], *draft]]))
        self._draft = draft
        self._draw(logits)

    def _run_pass(self, tokens: mx.array) -> mx.array:
        """Begin the pass over tokens `[rows, length]`; the logits, `[rows · length, vocab]`."""
        logits = self._logits(self._model.hidden_states(tokens, self._kv, features=TEXT))
        if self._constrained:
            mx.async_eval(logits)  # masks are made meanwhile
        return logits

    def _logits(self, hidden: mx.array) -> mx.array:
        """The logits `[rows · places, vocab]` for hidden states `[rows, places, hidden]`."""
        return self._model.head(hidden).reshape(hidden.shape[0] * hidden.shape[1], -1)

    @property
    def _constrained(self) -> bool:
        """Whether a row is held to a grammar."""
        return any(request.constraint is not None for request in self.requests)

    def _feed_prompts(self) -> Iterator[None]:
        """Prefill, a piece between two yields; after the last one the first tokens are drawn."""
        model, requests = self._model, self.requests
        for request in requests:
            request.start()
        media = [PlacedMedia.place(r.prompt, r.media, model.placeholders) for r in requests]
        prefix = Prefix(0, 0, TEXT)
        if requests[0].cache is None:
            self._kv = model.make_cache(kv_bits=requests[0].kv_bits)
            lengths = [len(request.prompt) for request in requests]
            adapters = tuple(placed.adapter for placed in media)
            self._kv.expect(lengths, adapters, [request.adapter for request in requests])
        else:
            prefix = requests[0].cache.reuse(requests[0].prompt, media[0], requests[0].adapter)
            self._kv = requests[0].cache.kv
        features = [prefix.features.then(placed.encode(model, prefix.encoded)) for placed in media]
        ids, mask = _padded([request.prompt[prefix.computed :] for request in requests])
        length = ids.shape[1]
        scored = any(request.prompt_logprobs is not None for request in requests)
        outputs = None if scored else 1
        pieces = prefill(
            model, ids, self._kv, attention_mask=mask, features=features, outputs=outputs
        )
        for hidden in pieces:
            done = self._kv.length - prefix.computed
            if scored:
                self._score_prompts(hidden, ids, done)
            for request in requests:
                request.reply.stats.cached_tokens = prefix.computed
                if request.on_prefill is not None:
                    own = len(request.prompt) - prefix.computed
                    request.on_prefill(max(0, done - length + own), own)
            if done == length:
                self._draw(self._logits(hidden[:, -1:] if scored else hidden))
                for request in requests:
                    if request.max_tokens == 0:
                        request.end_prompt()
            else:
                self._note_pass()
            yield

    def _score_prompts(self, hidden: mx.array, ids: np.ndarray, done: int) -> None:
        """Score the tokens of those prompts that ask for it, as far as a piece of them reaches.

        Args:
            hidden: `[rows, piece, hidden]`.
            ids: `[rows, length]`, all prompts, padded on the left.
            done: columns computed, this piece included.
        """
        length, begin = ids.shape[1], done - hidden.shape[1]
        end = min(done, length - 1)  # what follows the last column is the reply's
        for row, request in enumerate(self.requests):
            first = max(begin, length - len(request.prompt))
            if request.prompt_logprobs is None or request.finished or first >= end:
                continue
            states, tokens = hidden[row, first - begin : end - begin], ids[row, first + 1 : end + 1]
            scores = score_prompt(
                self._model.head, states, mx.array(tokens), request.prompt_logprobs
            )
            if not all(math.isfinite(score.logprob) for score in scores):
                request.cancel(nonfinite_error(self._model, request.prompt))
            request.reply.prompt_logprobs += scores

    def _recompute_crossing_rows(self) -> None:
        """Compute a row of several anew where it comes to need other rope factors.

        Left to the model, all rows would be. One that is alone is.
        """
        if len(self.requests) == 1:
            return
        kv = self._kv
        for row in kv.crossing(1):
            alone = self._model.make_cache(kv_bits=kv.kv_bits)
            here = slice(row, row + 1)
            alone.expect([kv.row_lengths[row] + 1], kv.adapters[here], kv.loaded[here])
            assert kv.tokens is not None
            ids = np.array(kv.tokens[here, : kv.length])
            mask = None if kv.valid is None else np.array(kv.valid[here, : kv.length])
            for _ in prefill(
                self._model, ids, alone, attention_mask=mask, features=kv.features[here]
            ):
                self.requests[row].reply.stats.forward_passes += 1
            kv.replace_row(row, alone)

    def _draw(self, logits: mx.array) -> None:
        """Choose the next token of each row, or the tokens after each place of one row.

        A placeholder token has no chance, since a reply has nothing to fill it with; nor has one
        that the row's grammar does not allow.

        Args:
            logits: `[rows, vocab]`, or `[places, vocab]` of one row.
        """
        rows, unchanged = len(self.requests), logits
        finite = mx.isfinite(logits.max(axis=-1))  # NaN and inf are never less than numbers
        if self._model.placeholders is not None:
            logits = mx.array(unchanged)  # a copy, since those are scored
            logits[:, mx.array(self._model.placeholders.tokens)] = -mx.inf
        if self._constrained:
            logits = self._constrain(logits)
        samplers = [request.sampler for request in self.requests]
        if rows == 1:
            tokens = samplers[0].draw(logits)
        elif all(sampler.sampling.is_greedy for sampler in samplers):
            tokens = mx.argmax(logits, axis=-1)
        else:
            drawn = [sampler(logits[row : row + 1]) for row, sampler in enumerate(samplers)]
            tokens = mx.concatenate(drawn)
        self._drawn = mx.where(finite, tokens.astype(mx.int32), NOT_FINITE).reshape(rows, -1)
        tops = [request.top_logprobs for request in self.requests]
        self._logprobs = score_rows(unchanged, tokens, tops)
        scored = [array for own in self._logprobs if own for array in own.found.arrays]
        mx.async_eval(self._drawn, *scored)
        self._note_pass()

    def _constrain(self, logits: mx.array) -> mx.array:
        """Set to -inf what the grammars of rows do not allow at their places."""
        places = 1 + len(self._draft)
        held: list[int] = []
        masks = []
        for row, request in enumerate(self.requests):
            if request.constraint is not None:
                held += range(row * places, (row + 1) * places)
                masks.append(request.constraint.allowed(logits.shape[-1], self._draft))
        here = mx.array(held)
        logits = mx.array(logits)  # a copy, since the unchanged ones are scored
        logits[here] = mx.where(mx.array(np.concatenate(masks)), logits[here], -mx.inf)
        return logits

    def _note_pass(self) -> None:
        for request, computed in zip(self.requests, self._kv.row_lengths, strict=True):
            request.computed = computed
            request.reply.stats.forward_passes += 1

    def drop_finished(self) -> None:
        """Let the rows go whose requests have finished."""
        rows = [row for row, request in enumerate(self.requests) if not request.finished]
        if len(rows) == len(self.requests):
            return
        self.requests = [self.requests[row] for row in rows]
        if rows and self._drawn is not None:
            self._kv.select(rows)
            self._drawn = self._drawn[mx.array(rows)]
            self._logprobs = [self._logprobs[row] for row in rows]


def _told(logprobs: RowLogprobs | None, place: int) -> TokenLogprob | None:
    return None if logprobs is None else logprobs.at(place)


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Prompts as the rows of one array, padded on the left, and 0 where they are padded."""
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int32)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, None if mask.all() else mask
