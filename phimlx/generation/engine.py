"""The engine: requests in, chunks of their replies out, a step at a time.

It owns what outlives a reader: which cache a request holds, wired memory and peak counters. A
stream that somebody abandons holds nothing but its request.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import mlx.core as mx

from phimlx.generation.batch import Batch
from phimlx.generation.reply import Chunk
from phimlx.generation.request import Request
from phimlx.machine.active_memory import ACTIVE_MEMORY, MemoryUse
from phimlx.machine.pass_cost import PUBLISHED
from phimlx.models.base import CausalLM


class Engine:
    """Generates the replies to any number of requests with one model."""

    def __init__(self, model: CausalLM, pass_cost: Callable[[int], float] = PUBLISHED.cost) -> None:
        """`pass_cost`: of a pass over so many tokens, relative to one; it decides what to draft."""
        self.model = model
        self.pass_cost = pass_cost
        self._batches: list[Batch] = []
        self._active: dict[Request, MemoryUse] = {}

    def add(self, *requests: Request) -> None:
        """Begin requests; several given together share their forward passes.

        A request whose prompt cache another one holds ends that one.

        Raises:
            GenerationError: where a prompt cache belongs to another model.
            ValueError: for prompt caches of requests that are given together.
        """
        if len(requests) > 1 and any(request.cache is not None for request in requests):
            raise ValueError("requests that share forward passes have no prompt caches")
        for request in requests:
            if request.cache is not None:
                request.cache.check(self.model)
                request.cache.lease(request)
        self._settle()
        for request in requests:
            self._active[request] = ACTIVE_MEMORY.begin()
        self._batches.append(Batch(self.model, requests, self.pass_cost))

    def step(self) -> list[tuple[Request, Chunk]]:
        """Run one forward pass for every batch; what has come, with whose it is.

        A prompt counts as many passes as it has pieces, so no request waits for another's prompt.

        Raises:
            GenerationError, PromptError: where media do not fit a prompt; its requests have ended.
        """
        self._settle()
        return [pair for batch in list(self._batches) for pair in self._step(batch)]

    def cancel(self, request: Request) -> None:
        """End a request; nothing where it has ended."""
        request.cancel()
        self._settle()

    def run(self, request: Request) -> Generator[Chunk]:
        """Generate one reply, whatever else there is waits meanwhile.

        However the reader stops, the request's cache is left holding what has been computed.

        Raises:
            GenerationError: where another request has taken the cache, or logits are not finite.
        """
        self.add(request)
        batch = self._batches[-1]
        try:
            while not request.finished:
                for _, chunk in self._step(batch):
                    yield chunk
            if request.error is not None:
                raise request.error
        finally:
            self.cancel(request)

    def run_all(
        self,
        requests: Sequence[Request],
        batch_size: int = 8,
        advance: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Generate all replies, several at a time.

        Args:
            requests: without prompt caches.
            batch_size: rows of a batch.
            advance: called with the number of requests that have finished.

        Raises:
            GenerationError: where logits are not finite.
        """
        longest_first = sorted(requests, key=lambda request: -len(request.prompt))
        for begin in range(0, len(requests), batch_size):
            group = longest_first[begin : begin + batch_size]
            self.add(*group)
            batch = self._batches[-1]
            try:
                while not batch.done:
                    self._step(batch)
            finally:
                for request in group:
                    self.cancel(request)
            for request in group:
                if request.error is not None:
                    raise request.error
            advance(len(group))
            mx.clear_cache()

    def _step(self, batch: Batch) -> list[tuple[Request, Chunk]]:
        try:
            return batch.step()
        except BaseException:
            for request in batch.requests:
                request.cancel()
            raise
        finally:
            self._settle()

    def _settle(self) -> None:
        """Let go of what has finished: its batch, its cache and its share of memory."""
        for batch in self._batches:
            if batch.done:
                batch.close()
        self._batches = [batch for batch in self._batches if not batch.done]
        for request in [request for request in self._active if request.finished]:
            use = self._active.pop(request, None)
            if use is not None:
                ACTIVE_MEMORY.end(use)
                request.reply.stats.peak_memory = use.peak
            if request.cache is not None:
                request.cache.release(request)
