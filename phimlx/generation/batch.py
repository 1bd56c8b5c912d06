"""Requests that are decoded together: each is a row of one cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import mlx.core as mx
import numpy as np

from phimlx.generation.logprobs import RowLogprobs, TokenLogprob, score_rows
from phimlx.generation.nonfinite import nonfinite_error
from phimlx.generation.prefix_pool import Row
from phimlx.generation.prompts import Prompts
from phimlx.generation.reply import Chunk
from phimlx.generation.request import Request
from phimlx.generation.speculation import PromptLookup
from phimlx.models.base import CausalLM
from phimlx.models.features import TEXT

CLEAR_EVERY = 256  # steps between handing freed buffers back to the system
NOT_FINITE = -1  # drawn in place of a token where logits are no numbers

Drawn = tuple[int, TokenLogprob | None]


class Batch:
    """A batch of requests, a token of each in one forward pass.

    While a token is read the next one is already being computed; where rows are held to grammars
    only the pass is, and the token is chosen when it is known what may come. A row leaves when its
    request has finished; its keys and values go to the request's prompt cache, where it has one. A
    row that comes to need other rope factors leaves, too: prompt and reply so far are to be
    prefilled again.

    The pass of a row that is alone may go over drafted tokens as well, where the text repeats
    itself; those that the sampler draws too are the tokens of the next steps. The next pass then
    waits until it is known what to draft.

    Args:
        prompts: that have been prefilled.
        hidden: of their last tokens, `[rows, 1, hidden]`.
        pass_cost: of a pass over so many tokens, relative to a pass over one.
        on_leave: called with each request that has finished, once its row has left.

    Attributes:
        requests: those that have not left.
        may_draft: whether a row that is alone may draft tokens.
        crossed: rows that left to be prefilled again; whoever steps the batch takes them out.
    """

    def __init__(
        self,
        model: CausalLM,
        prompts: Prompts,
        hidden: mx.array,
        pass_cost: Callable[[int], float],
        on_leave: Callable[[Request], object],
    ) -> None:
        assert prompts.kv is not None
        self.requests = prompts.requests
        self.may_draft = True
        self.crossed: list[Prompts] = []
        self._model = model
        self._pass_cost = pass_cost
        self._on_leave = on_leave
        self._kv = prompts.kv
        self._drawn: mx.array  # [rows, 1], or of one row [1, 1 + drafted]
        self._draft: list[int] = []  # what was fed to draw `_drawn`, behind the last known token
        self._logprobs: list[RowLogprobs | None] = []  # of `_drawn`, each row's
        self._ready: deque[Drawn] = deque()  # the row's next tokens
        self._crosses = False  # whether a row that is alone leaves when those are taken
        self._lookup: PromptLookup | None = None
        self._steps = 0
        self._draw(self._logits(hidden))

    @property
    def can_be_joined(self) -> bool:
        """Whether no row has drafted tokens or such that are known and not taken."""
        return not self._draft and not self._ready

    @property
    def rows(self) -> Iterator[Row]:
        """What the rows hold, of requests with prompt caches."""
        for row, request in enumerate(self.requests):
            if request.cache is not None:
                yield Row.of(request, request.cache, self._kv, row)

    def join(self, other: Batch) -> None:
        """Take the rows of another batch below these."""
        self._kv.join(other._kv)
        self._drawn = mx.concatenate([self._drawn, other._drawn])
        mx.async_eval(self._drawn)  # now, since it is read before the pass that comes next
        self._logprobs = self._logprobs + other._logprobs
        self.requests = self.requests + other.requests
        self._lookup = None

    def step(self) -> list[tuple[Request, Chunk]]:
        """Run one forward pass; the chunks that have come, in the order of the rows."""
        self.drop_finished()
        if not self.requests:
            return []
        requests, chunks = self.requests, []
        for request, (token, logprob) in zip(requests, self._next_tokens(), strict=True):
            if request.finished:
                continue  # its sampler or its grammar has failed meanwhile
            if token == NOT_FINITE:
                request.cancel(nonfinite_error(self._model, request.tokens))
                continue
            with request.guarded():
                chunks += [(request, chunk) for chunk in request.take(token, logprob)]
            if request.constraint is not None and request.constraint.error is not None:
                request.cancel(request.constraint.error)
        self.drop_finished()
        if self._crosses and self.requests and not self._ready:
            self._leave_to_prefill([0])
        self._steps += 1
        if self._steps % CLEAR_EVERY == 0:
            mx.clear_cache()
        return chunks

    def _next_tokens(self) -> list[Drawn]:
        """Give the next token of each row, and its log-probability where the row asks for it."""
        if self._ready:
            return [self._ready.popleft()]
        drawn, logprobs = self._drawn, self._logprobs  # the pass that is fed below has others
        lookup = self._prepare_lookup()
        crossing = self._kv.crossing(1)
        waits = bool(crossing or self._draft) or (lookup is not None and bool(lookup.draft()))
        logits: mx.array | None = None
        if not waits and self._goes_on:
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
                with request.guarded():
                    request.constraint.advance(found)
        if logits is not None and self._constrained:
            self._draw(logits)
        if len(rows) > 1:
            if crossing:
                self._leave_to_prefill(crossing)
                if self._goes_on:
                    self._draw(self._run_pass(self._drawn))
            return [(row[0], _told(own, 0)) for row, own in zip(rows, logprobs, strict=True)]
        (tokens,) = known
        if lookup is not None:
            lookup.extend(tokens)
        if waits:
            self._feed_draft(tokens, lookup)
        told = [(token, _told(logprobs[0], place)) for place, token in enumerate(tokens)]
        self._ready.extend(told[1:])
        return told[:1]

    @property
    def _goes_on(self) -> bool:
        """Whether a row needs a token behind the one that is drawn."""
        return any(request.remaining > 1 for request in self.requests)

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
        request.computed = self._kv.row_lengths[0]
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
        if self._kv.crossing(1):
            self._crosses = True
            return
        ends = not request.stop_tokens.isdisjoint(tokens)  # its keys and values are for later turns
        draft = [] if ends or lookup is None else lookup.draft(room - 1)
        if request.constraint is not None:
            with request.guarded():
                draft = request.constraint.fitting(draft)
        while draft and self._kv.crossing(1 + len(draft)):
            draft.pop()
        logits = self._run_pass(mx.array([[tokens[-1], *draft]]))
        self._draft = draft
        self._draw(logits)

    def _run_pass(self, tokens: mx.array) -> mx.array:
        """Begin the pass over tokens `[rows, length]`; the logits, `[rows · length, vocab]`."""
        logits = self._logits(self._model.hidden_states(tokens, self._kv, features=TEXT))
        for request, computed in zip(self.requests, self._kv.row_lengths, strict=True):
            request.computed = computed
            request.reply.stats.forward_passes += 1
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

    def _draw(self, logits: mx.array) -> None:
        """Choose the next token of each row, or the tokens after each place of one row.

        A placeholder token has no chance, since a reply has nothing to fill it with; nor has one
        that the row's grammar does not allow.

        Args:
            logits: `[rows, vocab]`, or `[places, vocab]` of one row.
        """
        rows, unchanged = len(self.requests), logits
        finite = mx.isfinite(logits.max(axis=-1))  # NaN and inf are never less than numbers
        media = self._model.placeholders
        if media is not None and media.in_vocabulary:
            logits = mx.array(unchanged)  # a copy, since those are scored
            logits[:, mx.array(media.in_vocabulary)] = -mx.inf
        if self._constrained:
            logits = self._constrain(logits)
        if rows > 1 and all(request.sampler.sampling.is_greedy for request in self.requests):
            tokens = mx.argmax(logits, axis=-1)
        else:
            places = len(logits) // rows
            drawn = [
                _choose(request, logits[row * places : (row + 1) * places])
                for row, request in enumerate(self.requests)
            ]
            tokens = mx.concatenate(drawn)
        self._drawn = mx.where(finite, tokens.astype(mx.int32), NOT_FINITE).reshape(rows, -1)
        tops = [request.top_logprobs for request in self.requests]
        self._logprobs = score_rows(unchanged, tokens, tops)
        scored = [array for own in self._logprobs if own for array in own.found.arrays]
        mx.async_eval(self._drawn, *scored)

    def _constrain(self, logits: mx.array) -> mx.array:
        """Set to -inf what the grammars of rows do not allow at their places."""
        places = 1 + len(self._draft)
        held: list[int] = []
        masks = []
        for row, request in enumerate(self.requests):
            if request.constraint is not None:
                with request.guarded():
                    masks.append(request.constraint.allowed(logits.shape[-1], self._draft))
                    held += range(row * places, (row + 1) * places)
        if not held:
            return logits
        here, logits = mx.array(held), mx.array(logits)  # a copy, since those are scored
        logits[here] = mx.where(mx.array(np.concatenate(masks)), logits[here], -mx.inf)
        return logits

    def drop_finished(self) -> None:
        """Let the rows go whose requests have finished."""
        rows = [row for row, request in enumerate(self.requests) if not request.finished]
        if len(rows) == len(self.requests):
            return
        gone = [(row, request) for row, request in enumerate(self.requests) if request.finished]
        for row, request in gone:
            self._hand_back(row, request)
        self._keep(rows)
        for _, request in gone:
            self._on_leave(request)

    def _hand_back(self, row: int, request: Request) -> None:
        """Leave in a request's prompt cache the tokens of prompt and reply alone."""
        if request.cache is None:
            return
        request.computed = min(self._kv.row_lengths[row], len(request.tokens))
        if len(self.requests) == 1 and self._kv.valid is None:
            self._kv.trim(request.computed)
            request.cache.kv = self._kv
        else:
            request.cache.kv = self._kv.row(row, request.computed)
            request.cache.kv.part()
        request.cache.kv.trim(request.cache.kv.held)
        request.computed = request.cache.kv.length

    def _leave_to_prefill(self, rows: Sequence[int]) -> None:
        """Let rows go that need other rope factors; the features of their media go along."""
        for row in rows:
            features = self._kv.features[row] if self._kv.features else TEXT
            self.crossed.append(Prompts(self._model, [self.requests[row]], features))
        self._keep([row for row in range(len(self.requests)) if row not in rows])

    def _keep(self, rows: Sequence[int]) -> None:
        """Keep these rows alone."""
        self.requests = [self.requests[row] for row in rows]
        if rows:
            self._kv.select(rows)
            self._drawn = self._drawn[mx.array(list(rows))]
            self._logprobs = [self._logprobs[row] for row in rows]


def _choose(request: Request, logits: mx.array) -> mx.array:
    """Draw a request's tokens after each place, `[places]`; it ends where its sampler fails."""
    try:
        return request.sampler.draw(logits).astype(mx.int32)
    except Exception as error:
        request.fail(error)
        return mx.full(len(logits), NOT_FINITE, mx.int32)


def _told(logprobs: RowLogprobs | None, place: int) -> TokenLogprob | None:
    return None if logprobs is None else logprobs.at(place)
