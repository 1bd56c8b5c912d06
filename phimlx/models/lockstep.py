"""One machine's passes through a shared model, done by all: the first leads, the others follow.

Whatever is decided - which tokens are drawn, what is drafted, batched or kept - is decided by the
leader alone. The others are told what happens to its caches and which tokens are fed, and do the
same; so they cannot come to other decisions.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import mlx.core as mx
import numpy as np

from phimlx.errors import GenerationError
from phimlx.machine.processes import ProcessGroup
from phimlx.models.base import CausalLM
from phimlx.models.cache.kv import Cache
from phimlx.models.features import TEXT

Operation = list[Any]
"""A name and what it is to be done with, as JSON has it."""


class Leader:
    """Tells the others what to do, and does it with them."""

    def __init__(self, processes: ProcessGroup) -> None:
        self._processes = processes
        self._keys = count()
        self._untold: list[Operation] = []
        self._lost = False

    def new_key(self) -> int:
        """Number a cache."""
        return next(self._keys)

    def share(self, cache: Cache, expected_length: int, kv_bits: int | None) -> Cache:
        """Let the others make the cache that has just been made here."""
        shared = SharedCache(cache, self, self.new_key())
        self.note("cache", shared.key, expected_length, kv_bits)
        return shared

    def note(self, name: str, *arguments: Any) -> None:
        """Let the others do something before the next pass."""
        self._untold.append([name, *arguments])

    def run(
        self,
        model: CausalLM,
        input_ids: mx.array,
        cache: Cache | None,
        attention_mask: mx.array | None,
        outputs: int | None,
    ) -> mx.array:
        """Compute hidden states together; arguments and result as of `CausalLM.hidden_states`.

        Raises:
            MachineLostError: where another machine does not answer any more.
        """
        key = inner = None
        if cache is not None:
            assert isinstance(cache, SharedCache)
            key, inner = cache.key, cache.inner
        mask = None if attention_mask is None else np.array(attention_mask).tolist()
        self.note("run", key, np.array(input_ids).tolist(), mask, outputs)
        with _undisturbed(), self._together():
            self._tell()
            return _run(self._processes, model, input_ids, inner, attention_mask, outputs)

    def end(self) -> None:
        """Let the others go."""
        if not self._lost:
            self.note("end")
            with _undisturbed(), self._together():
                self._tell()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Work with the others; where that fails nobody knows any more what they do."""
        if self._lost:
            raise GenerationError(
                "The machines that share the model have lost each other.",
                hint=self._processes.watchdog.remedy,
            )
        self._lost = True
        self._processes.watchdog.idle = False
        yield
        self._processes.watchdog.idle = True
        self._lost = False

    def _tell(self) -> None:
        told, self._untold = self._untold, []
        self._processes.broadcast_json(told)


class SharedCache(Cache):
    """The leader's view of a cache of which every machine holds its own heads.

    It reads as that on this machine does, and what changes it is told to the others.
    """

    def __init__(self, inner: Cache, leader: Leader, key: int) -> None:
        # Of a cache's own attributes there are none here: `__getattr__` finds the inner one's.
        self.inner = inner
        self.leader = leader
        self.key = key

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __del__(self) -> None:
        self.leader.note("free", self.key)

    def trim(self, length: int) -> None:
        self.leader.note("trim", self.key, length)
        self.inner.trim(length)

    def mark(self) -> None:
        self.leader.note("mark", self.key)
        self.inner.mark()

    def expect(
        self,
        lengths: Sequence[int],
        adapters: tuple[str | None, ...] = (),
        loaded: Sequence[str | None] = (),
    ) -> None:
        self.leader.note("expect", self.key, list(lengths), list(adapters), list(loaded))
        self.inner.expect(lengths, adapters, loaded)

    def row(self, row: int, length: int) -> Cache:
        found = SharedCache(self.inner.row(row, length), self.leader, self.leader.new_key())
        self.leader.note("row", self.key, row, length, found.key)
        return found

    def part(self) -> None:
        self.leader.note("part", self.key)
        self.inner.part()

    def select(self, rows: Sequence[int]) -> None:
        self.leader.note("select", self.key, list(rows))
        self.inner.select(rows)

    def join(self, other: Cache) -> None:
        assert isinstance(other, SharedCache)
        self.leader.note("join", self.key, other.key)
        self.inner.join(other.inner)


class Follower:
    """Does what the leader does, until that lets it go."""

    def __init__(self, model: CausalLM, processes: ProcessGroup) -> None:
        self._model = model
        self._processes = processes
        self._caches: dict[int, Cache] = {}

    def follow(self) -> None:
        """Follow to the end.

        Raises:
            MachineLostError: where another machine does not answer any more.
        """
        while True:
            for name, *arguments in self._processes.broadcast_json(None):
                if name == "end":
                    return
                getattr(self, f"_{name}")(*arguments)

    def _cache(self, key: int, expected_length: int, kv_bits: int | None) -> None:
        self._caches[key] = self._model.make_cache(expected_length, kv_bits=kv_bits)

    def _free(self, key: int) -> None:
        del self._caches[key]

    def _run(
        self,
        key: int | None,
        input_ids: list[list[int]],
        mask: list[list[int]] | None,
        outputs: int | None,
    ) -> None:
        cache = None if key is None else self._caches[key]
        attention_mask = None if mask is None else mx.array(mask)
        ids = mx.array(input_ids)
        _run(self._processes, self._model, ids, cache, attention_mask, outputs)

    def _trim(self, key: int, length: int) -> None:
        self._caches[key].trim(length)

    def _mark(self, key: int) -> None:
        self._caches[key].mark()

    def _expect(self, key: int, lengths: list[int], adapters: list[Any], loaded: list[Any]) -> None:
        self._caches[key].expect(lengths, tuple(adapters), loaded)

    def _row(self, key: int, row: int, length: int, new: int) -> None:
        self._caches[new] = self._caches[key].row(row, length)

    def _part(self, key: int) -> None:
        self._caches[key].part()

    def _select(self, key: int, rows: list[int]) -> None:
        self._caches[key].select(rows)

    def _join(self, key: int, other: int) -> None:
        self._caches[key].join(self._caches[other])


def _run(
    processes: ProcessGroup,
    model: CausalLM,
    input_ids: mx.array,
    cache: Cache | None,
    attention_mask: mx.array | None,
    outputs: int | None,
) -> mx.array:
    """Compute hidden states now: sums of two passes must not mix, so none may be left for later."""
    hidden = model.own_hidden_states(input_ids, cache, attention_mask, TEXT, outputs)
    with processes.translate_errors():
        mx.eval(hidden, [] if cache is None else cache.state)
    processes.watchdog.heard()
    return hidden


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block: what the others are told has to be done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[Any] = []
    previous = signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if came and callable(previous):
        previous(*came[0])
