"""The engine: requests in, chunks of their replies out, a step at a time.

It owns what outlives a reader: which cache a request holds, wired memory and peak counters. A
stream that somebody abandons holds nothing but its request.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import mlx.core as mx

from phimlx.errors import GenerationError
from phimlx.generation.prompt_cache import Prefixes, PromptCache
from phimlx.generation.reply import Chunk
from phimlx.generation.request import Request
from phimlx.generation.scheduler import MAX_ROWS, Scheduler
from phimlx.machine.active_memory import ACTIVE_MEMORY, MemoryUse
from phimlx.machine.pass_cost import PUBLISHED
from phimlx.models.base import CausalLM


class PrefixStore(Prefixes, Protocol):
    """Where prefixes are kept beyond a process, as `generation.prefix_store` does."""

    def save(self, cache: PromptCache) -> None:
        """Keep what a cache holds."""


@dataclass
class Totals:
    """What an engine has done since it was made, counted when requests end."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, not computed again
    cache_hits: int = 0  # requests with such
    generated_tokens: int = 0

    def count(self, request: Request) -> None:
        """Add a request."""
        stats = request.reply.stats
        self.requests += 1
        self.prompt_tokens += stats.prompt_tokens
        self.cached_tokens += stats.cached_tokens
        self.cache_hits += stats.cached_tokens > 0
        self.generated_tokens += stats.generated_tokens


class Engine:
    """Generates the replies to any number of requests with one model.

    Requests that are added share a continuous batch, which `step` advances while the engine is
    `busy`. A prompt goes on from what earlier ones, and those that are being answered, have in
    common with it: `reply.stats.cached_tokens` tells how much. One that is `run` has a batch of its
    own, and may have a prompt cache: it is advanced as its chunks are asked for.

    One thread at a time: whoever has several calls all of it from one of them.

    Attributes:
        totals: of all requests that have been admitted and have ended.
    """

    def __init__(
        self,
        model: CausalLM,
        pass_cost: Callable[[int], float] = PUBLISHED.cost,
        max_rows: int = MAX_ROWS,
        memory: int | None = None,
        prefix_memory: int | None = None,
        prefixes: PrefixStore | None = None,
    ) -> None:
        """Make an engine without requests.

        Args:
            pass_cost: of a pass over so many tokens, relative to one; it decides what to draft.
            max_rows: of the batch.
            memory: bytes that keys and values may take; what is left beside the weights where None.
            prefix_memory: of these, bytes for what earlier requests leave to later ones, which
                give way where requests need them; half where None, 0 for no such reuse.
            prefixes: looked in for more of a prompt; `save_prefixes` adds to it.
        """
        self.model = model
        self.pass_cost = pass_cost
        self.totals = Totals()
        self._prefixes = prefixes
        self._prefix_memory = prefix_memory
        self._scheduler = self._schedule(max_rows, memory)
        self._schedulers = [self._scheduler]
        self._running: list[Scheduler] = []
        self._active: dict[Request, MemoryUse] = {}

    def _schedule(self, max_rows: int, memory: int | None = None) -> Scheduler:
        settings = (max_rows, memory, self._prefix_memory, self._prefixes)
        return Scheduler(self.model, self.pass_cost, self._begin, *settings)

    @property
    def waiting(self) -> int:
        """How many requests that were added have not been admitted."""
        return self._scheduler.waiting

    @property
    def running(self) -> int:
        """How many requests that were added are prefilled or decoded."""
        return self._scheduler.running

    @property
    def busy(self) -> bool:
        """Whether there is anything for `step` to do."""
        return self.waiting + self.running > 0

    @property
    def prefix_bytes(self) -> int:
        """Bytes that are held for requests to come."""
        return self._scheduler.prefixes.nbytes

    def forget_prefixes(self) -> None:
        """Let go of what is held for requests to come, as where an adapter's name becomes free."""
        self._scheduler.prefixes.shrink(0)

    def save_prefixes(self) -> None:
        """Write what is held for requests to come to the store, where there is one.

        It takes as long as the disk takes: for when nobody waits.
        """
        if self._prefixes is not None:
            for cache in self._scheduler.prefixes.caches:
                self._prefixes.save(cache)

    def limit_memory(self, nbytes: int | None) -> None:
        """Change what keys and values may take; what is left beside the weights where None."""
        self._scheduler.limit_memory(nbytes)

    def add(self, *requests: Request) -> None:
        """Let requests wait for their turn in the continuous batch.

        Raises:
            GenerationError: where keys and values of one would never fit, or the adapter that it
                names is not there.
            ValueError: for requests with prompt caches, which are to be `run`.
        """
        if any(request.cache is not None for request in requests):
            raise ValueError("requests that share forward passes have no prompt caches")
        self._scheduler.add(requests)

    def step(self) -> list[tuple[Request, Chunk]]:
        """Compute a token of every request that was added, and a piece of the prompt that is next.

        Returns:
            What has come, with whose it is. A request that could not go on has its `error`.
        """
        return self._step(self._scheduler)

    def cancel(self, request: Request) -> None:
        """End a request, whose row is free at once; nothing where it has ended."""
        request.cancel()
        self._scheduler.settle()
        self._settle()

    def users_of(self, adapter: str | None) -> int:
        """Count the requests that have not ended and use an adapter."""
        requests = {request for request in self._active if not request.finished}
        requests.update(*(scheduler.requests for scheduler in self._schedulers))
        return sum(request.adapter == adapter for request in requests)

    def run(self, request: Request) -> Generator[Chunk]:
        """Generate one reply, whatever else there is waits meanwhile.

        A request whose prompt cache another one holds ends that one. However the reader stops, the
        cache is left holding what has been computed.

        Raises:
            GenerationError: where the prompt cache belongs to another model, another request has
                taken it, the adapter is not there, or logits are not finite.
            PromptError: where media do not fit the prompt.
        """
        self.model.check_adapter(request.adapter)
        if request.cache is not None:
            request.cache.check(self.model, request.kv_bits)
            request.cache.lease(request)
        self._settle()
        # Whether it fits shows: nobody else is refused for it.
        alone = Scheduler(self.model, self.pass_cost, self._begin, 1, sys.maxsize, 0)
        alone.add([request])
        self._running.append(alone)
        try:
            while not request.finished:
                for _, chunk in self._step(alone):
                    yield chunk
            if request.error is not None:
                raise request.error
        finally:
            self.cancel(request)

    def run_each(self, requests: Iterable[Request], batch_size: int = 8) -> Generator[Request]:
        """Generate replies, several at a time, and yield each request when it has ended.

        One that could not go on, or whose keys and values would never fit, has its `error`.

        Args:
            requests: without prompt caches; taken as there is room for them.
            batch_size: rows of the batch.
        """
        scheduler = self._schedule(batch_size)
        self._schedulers.append(scheduler)
        coming, going = iter(requests), list[Request]()
        try:
            while True:
                for request in islice(coming, 2 * batch_size - len(going)):
                    going.append(request)
                    try:
                        scheduler.add([request])
                    except GenerationError as error:
                        request.cancel(error)
                if not going:
                    return
                scheduler.step()
                self._settle()
                yield from (request for request in going if request.finished)
                going = [request for request in going if not request.finished]
        finally:
            scheduler.cancel_all()
            self._schedulers.remove(scheduler)
            self._settle()

    def run_all(
        self,
        requests: Sequence[Request],
        batch_size: int = 8,
        advance: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Generate all replies, several at a time.

        Args:
            requests: without prompt caches.
            batch_size: rows of the batch.
            advance: called with the number of requests that have finished.

        Raises:
            GenerationError: where logits are not finite, or keys and values would never fit.
            PromptError: where media do not fit a prompt.
        """
        longest_first = sorted(requests, key=lambda request: -len(request.prompt))
        with closing(self.run_each(longest_first, batch_size)) as ended:
            for request in ended:
                if request.error is not None:
                    raise request.error
                advance(1)
        mx.clear_cache()

    def _begin(self, request: Request) -> None:
        self._active[request] = ACTIVE_MEMORY.begin()

    def _step(self, scheduler: Scheduler) -> list[tuple[Request, Chunk]]:
        try:
            return scheduler.step()
        except BaseException:
            scheduler.cancel_all()
            raise
        finally:
            self._settle()

    def _settle(self) -> None:
        """Let go of what has finished: its row, its cache and its share of memory."""
        for scheduler in self._running:
            scheduler.settle()
        self._running = [each for each in self._running if each.waiting + each.running]
        for request in [request for request in self._active if request.finished]:
            use = self._active.pop(request, None)
            if use is not None:
                ACTIVE_MEMORY.end(use)
                request.reply.stats.peak_memory = use.peak
                self.totals.count(request)
            if request.cache is not None:
                request.cache.release(request)
