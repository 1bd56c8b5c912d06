"""Continuous batching: requests join the rows that are decoded, and leave them, between steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import count
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from phimlx.errors import GenerationError, ResourceError, shortage
from phimlx.generation.batch import Batch
from phimlx.generation.prefill import piece_tokens
from phimlx.generation.prefix_pool import PrefixPool, Row
from phimlx.generation.prompt_cache import Prefixes, PromptCache
from phimlx.generation.prompts import Prompts
from phimlx.generation.reply import Chunk
from phimlx.generation.request import Request
from phimlx.machine.device import prefill_tokens
from phimlx.machine.exiting import COMPUTING
from phimlx.machine.kv_bits import KV_BITS, kv_group_size
from phimlx.machine.memory import (
    cache_bytes,
    dequantized_bytes_per_token,
    footprint,
    machine_memory,
)
from phimlx.models.base import CausalLM
from phimlx.sizes import size_text

MAX_ROWS = 16
RESERVED = 2048  # tokens of a reply that a forecast counts, however many it may have


class Scheduler:
    """Admits requests, prefills their prompts in pieces, and decodes all in one batch.

    A step is a piece of a prompt at most, and one token for every row: nobody waits for another's
    prompt longer than a piece takes. Requests are admitted in the order in which they came, as
    there are rows and memory for them. The prompt of which least is left is the next, and that
    which came first has its turn when others have had as many tokens as a piece has: so a short
    prompt does not wait for a long one, nor a long one for many short ones; short ones that wait
    together are prefilled together. Rows have the same `kv_bits`: a request that has others waits
    until they have ended.

    What a row held when it left stays in memory, for requests that begin as it did, until the
    memory is needed for others that are admitted. They go on from rows that are still being
    computed, too.

    What one request's own code raises (its reader, sampler, grammar, media) ends that request. A
    pass that fails ends those that took part in it. Where it failed for want of memory, what is
    kept for later goes, or else the newest half of the requests; the others are computed again.

    Args:
        pass_cost: as `Batch` takes it.
        on_admit: called with each request whose turn has come.
        max_rows: of the batch.
        memory: bytes that keys and values may take; what is left beside the weights where None.
        prefix_memory: of these, what rows that have left may take; half where None.
        store: looked in for more of a prompt than is in memory.
    """

    def __init__(
        self,
        model: CausalLM,
        pass_cost: Callable[[int], float],
        on_admit: Callable[[Request], object] = lambda request: None,
        max_rows: int = MAX_ROWS,
        memory: int | None = None,
        prefix_memory: int | None = None,
        store: Prefixes | None = None,
    ) -> None:
        self._model = model
        self._pass_cost = pass_cost
        self._on_admit = on_admit
        self._max_rows = max_rows
        self._memory = memory
        self._found: tuple[frozenset[str], int] | None = None  # with which adapters, how much
        self._prefix_memory = prefix_memory
        self._store = store
        self._waiting: deque[Request] = deque()
        self._arrivals = count()
        self._prompts: list[Prompts] = []  # admitted, in the order in which they came
        self._joining: list[Batch] = []  # prefilled
        self._rows: Batch | None = None
        self._ahead = 0  # tokens of prompts that were read before that which came first

    @property
    def waiting(self) -> int:
        """How many requests have not been admitted."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many requests are prefilled or decoded."""
        return len(self._admitted)

    @cached_property
    def prefixes(self) -> PrefixPool:
        """The rows that have left."""
        limit = self._left // 2 if self._prefix_memory is None else self._prefix_memory
        pool = PrefixPool(self._model, limit, self._store)
        pool.live = self._computing
        return pool

    def limit_memory(self, nbytes: int | None) -> None:
        """Change what keys and values may take; those that have been admitted keep theirs."""
        self._memory = nbytes
        if self._prefix_memory is None:
            self.prefixes.limit = self._left // 2
            self.prefixes.shrink(self.prefixes.limit)

    def add(self, requests: Iterable[Request]) -> None:
        """Let requests wait for their turn.

        Raises:
            GenerationError: for one whose keys and values would never fit, or whose adapter is not
                there.
        """
        requests = list(requests)
        for request in requests:
            self._check(request)
        self._waiting.extend(requests)

    @COMPUTING
    def step(self) -> list[tuple[Request, Chunk]]:
        """Compute a piece of a prompt, and a token of every row.

        A request that could not go on has its `error`.
        """
        self.settle()
        self._admit()
        self._prefill()
        self._join()
        chunks = []
        if self._rows is not None:
            self._rows.may_draft = not self._prompts and not self._joining
            try:
                chunks = self._rows.step()
            except Exception as error:
                failed, self._rows = self._rows, None
                self._go_on(failed.requests, error)
                return []
            self._prompts = self._rows.crossed + self._prompts
            self._rows.crossed = []
        self.settle()
        self._join()
        return chunks

    def _join(self) -> None:
        """Let rows whose prompts are done be decoded with the others, where that is possible."""
        while self._joining and (self._rows is None or self._rows.can_be_joined):
            batch = self._joining.pop(0)
            if self._rows is None:
                self._rows = batch
            else:
                self._rows.join(batch)

    def cancel_all(self) -> None:
        """End every request; nothing of them is kept."""
        for request in (*self._waiting, *self._admitted):
            request.cancel()
        self._waiting.clear()
        self._prompts, self._joining, self._rows = [], [], None

    @property
    def requests(self) -> list[Request]:
        """Those that have not ended."""
        return [each for each in (*self._waiting, *self._admitted) if not each.finished]

    def settle(self) -> None:
        """Let go of rows that have ended, and of those who stopped waiting."""
        if any(request.finished for request in self._waiting):
            self._waiting = deque(request for request in self._waiting if not request.finished)
        for prompts in [prompts for prompts in self._prompts if prompts.done]:
            self._prompts.remove(prompts)
            for request in prompts.requests:
                self._keep(request)
        for batch in self._batches:
            batch.drop_finished()
        self._joining = [batch for batch in self._joining if batch.requests]
        if self._rows is not None and not self._rows.requests:
            self._rows = None

    @property
    def _batches(self) -> list[Batch]:
        return self._joining if self._rows is None else [self._rows, *self._joining]

    @property
    def _holders(self) -> list[Batch | Prompts]:
        return [*self._batches, *self._prompts]

    @property
    def _admitted(self) -> list[Request]:
        """Requests that have a row."""
        return [request for holder in self._holders for request in holder.requests]

    def _computing(self) -> Iterator[Row]:
        """List what is known of the rows."""
        for holder in self._holders:
            yield from holder.rows

    def _admit(self) -> None:
        """Begin with those that are next, as there are rows and memory for them."""
        admitted = self._admitted
        while self._waiting and self._may_join(self._waiting[0], admitted):
            request = self._waiting.popleft()
            request.arrival = next(self._arrivals)
            self._on_admit(request)
            self._prompts.append(self._begin(request))
            admitted.append(request)

    def _begin(self, request: Request) -> Prompts:
        scored = request.prompt_logprobs is not None  # so that all of it is to be computed
        if request.cache is None and not scored and self._prefix_memory != 0:
            request.cache = PromptCache(self._model, request.kv_bits, self.prefixes)
        return Prompts(self._model, [request])

    def _prefill(self) -> None:
        """Compute a piece of a prompt, and of those that can be computed with it."""
        if not self._prompts:
            return
        prompts = first = self._prompts[0]
        if self._ahead < piece_tokens(shared=True):
            prompts = min(self._prompts, key=lambda prompts: prompts.left)
        try:
            prompts.begin()
        except Exception as error:
            prompts.fail(error)
            return
        try:
            others = [other for other in self._prompts if other is not prompts]
            for other in prompts.gather(others):
                self._prompts.remove(other)
            self._make_room()
            prompts.shared = self._rows is not None or len(self._prompts) > 1
            left = prompts.left
            hidden = prompts.step()
            read = len(prompts.requests) * (left - prompts.left)
            self._ahead = 0 if prompts is first else self._ahead + read
            if hidden is None:
                return
            batch = Batch(self._model, prompts, hidden, self._pass_cost, self._keep)
        except Exception as error:
            self._prompts.remove(prompts)
            self._go_on(prompts.requests, error)
            return
        self._prompts.remove(prompts)
        self._joining.append(batch)

    def _go_on(self, failed: list[Request], error: Exception) -> None:
        """Go on after a pass over the rows of requests that failed, and left nothing of use."""
        for request in failed:
            if request.cache is not None and request.cache.prefixes is self.prefixes:
                request.cache = None
        short = shortage(error)
        if not isinstance(short, ResourceError):
            for request in failed:
                request.fail(error)
            return
        if self.prefixes.nbytes:
            self.prefixes.shrink(0)
        else:
            there = sorted((*self._admitted, *failed), key=lambda request: request.arrival)
            for request in there[len(there) // 2 :]:
                request.cancel(short)
        for request in failed:
            if not request.finished:
                request.restart()
                self._prompts.append(self._begin(request))
        self.settle()
        mx.clear_cache()

    def _keep(self, request: Request) -> None:
        """Take what a request's row held, where it is not the request's own prompt cache."""
        if request.cache is not None and request.cache.prefixes is self.prefixes:
            self.prefixes.put(request.cache, request.tokens)
            request.cache = None
            self._make_room()

    def _make_room(self) -> None:
        """Let rows that have left give way to those that are computed."""
        if self._prefix_memory == 0:
            return
        admitted = self._admitted
        if admitted:
            self.prefixes.shrink(self._left - self._forecast(admitted))

    def _may_join(self, request: Request, others: list[Request]) -> bool:
        """Whether there is a row and memory for a request beside others."""
        if not others:
            return True
        if len(others) >= self._max_rows:
            return False
        if any(each.kv_bits != request.kv_bits for each in others):
            return False
        return self._forecast([*others, request]) <= self._left

    def _forecast(self, requests: list[Request]) -> int:
        """Bytes that the keys and values of requests come to take together."""
        columns = max(map(_columns, requests))
        return len(requests) * self._bytes(columns, requests[0].kv_bits)

    def _check(self, request: Request) -> None:
        self._model.check_adapter(request.adapter)
        needed = self._bytes(_columns(request), request.kv_bits)
        if needed > self._left:
            enough = [
                bits
                for bits in KV_BITS
                if request.kv_bits is None
                and kv_group_size(self._model.config.head_dim) is not None
                and self._bytes(_columns(request), bits) <= self._left
            ]
            smaller = (
                f" It fits with kv_bits={enough[0]} (--kv-bits {enough[0]})." if enough else ""
            )
            raise GenerationError(
                f"The prompt has {len(request.prompt):,} tokens, whose keys and values and those "
                f"of the reply take {size_text(needed)}; {size_text(max(0, self._left))} are left "
                "beside the model.",
                hint=f"Shorten the prompt.{smaller}",
            )

    def _bytes(self, columns: int, kv_bits: int | None) -> int:
        """Bytes of a row of so many tokens, and of what is dequantized of it at a time."""
        shape, itemsize = self._model.config, self._itemsize
        held = cache_bytes(shape, columns, itemsize, kv_bits)
        return held + columns * dequantized_bytes_per_token(shape, itemsize, kv_bits)

    @cached_property
    def _itemsize(self) -> int:
        """Bytes of a number as the model computes."""
        return self._model.compute_dtype.size

    @property
    def _left(self) -> int:
        """Bytes that keys and values may take."""
        if self._memory is not None:
            return self._memory
        adapters = self._model.loaded_adapters
        if self._found is None or self._found[0] != adapters:
            parameters: Any = tree_flatten(self._model.parameters())
            weights = sum(array.nbytes for _, array in parameters)
            held = footprint(self._model.config, weights, prefill_tokens(), self._itemsize)
            self._found = adapters, machine_memory() - held.weights - held.working
        return self._found[1]


def _columns(request: Request) -> int:
    """Tokens of prompt and reply, as far as they are forecast."""
    return len(request.prompt) + min(request.max_tokens, RESERVED)
