"""Passes through shared models, done by all machines: the first one leads, the others follow.

Whatever is decided - which tokens are drawn, what is drafted, batched or kept - is decided by the
leader alone. The others are told what happens to its caches and what is fed, and do the same; so
they cannot come to other decisions. While there is nothing to do they rest, and hear after each
while that the leader is there, as it hears that they are.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import mlx.core as mx
import numpy as np

from phimlx.errors import MachineLostError, PhimlxError
from phimlx.machine.processes import ProcessGroup
from phimlx.models.base import CausalLM
from phimlx.models.cache.kv import Cache
from phimlx.models.features import TEXT, Features

QUIET = 1.0  # seconds without a pass, after which the others rest
REST = 0.1  # seconds, after which all hear from each other again: MLX waits without sleeping
LAST_PATIENCE = 10.0  # seconds, for the others to answer when the run ends

Operation = list[Any]
"""A name and what it is to be done with, as JSON has it."""


class Lockstep:
    """The leader's side: what the others are told, one thing after the other.

    Attributes:
        processes: the machines.
        lost: how they lost each other; None while they have not.
        on_lost: called, in a thread, where that is noticed while nobody asks for anything.
    """

    def __init__(self, processes: ProcessGroup) -> None:
        self.processes = processes
        self.lost: MachineLostError | None = None
        self.on_lost: Callable[[MachineLostError], object] = lambda error: None
        self.new_key = count().__next__
        self._untold: deque[Operation] = deque()
        self._turn = threading.Lock()
        self._worked = time.monotonic()
        self._ended = threading.Event()
        processes.watchdog.idle = True
        self._beats = threading.Thread(target=self._beat, name="phimlx-beat", daemon=True)

    def note(self, name: str, *arguments: Any) -> None:
        """Let the others do something before they are told the next."""
        self._untold.append([name, *arguments])

    @contextmanager
    def together(self, name: str | None = None, *arguments: Any) -> Iterator[None]:
        """Tell the others what to do, and do it with them in the block, which Ctrl-C waits for.

        Where this machine's part fails with an error of ours, theirs has to fail as well, or not
        to matter. After any other nobody knows any more what they do.

        Raises:
            MachineLostError: where one does not answer any more.
        """
        watchdog = self.processes.watchdog
        with undisturbed(), self._turn:
            if self.lost is not None:
                raise self.lost
            if name is not None:
                self.note(name, *arguments)
            watchdog.idle = False
            try:
                told = [self._untold.popleft() for _ in range(len(self._untold))]
                self.processes.broadcast_json(told)
                yield
            except MachineLostError as error:
                self.lost = error
                raise
            except PhimlxError:
                raise
            except BaseException:
                self.lost = MachineLostError(
                    "The machines that share the model have lost each other.",
                    hint=watchdog.remedy,
                )
                raise
            finally:
                watchdog.idle = True
                if name != "rest":
                    self._worked = time.monotonic()
                if not self._beats.ident:
                    # Not before: of the threads that use the ring, MLX tells the first alone where
                    # a machine is lost within a pass; others wait, for as long as the watchdog has
                    # patience.
                    self._beats.start()

    def end(self) -> None:
        """Let the others go.

        Raises:
            MachineLostError: where they have been lost, so that whoever waits for more is told.
        """
        self._ended.set()
        self.processes.watchdog.patience = LAST_PATIENCE
        with self.together("end"):
            pass
        self._beats.join()

    def _beat(self) -> None:
        while not self._ended.wait(REST):
            if time.monotonic() - self._worked < QUIET:
                continue
            try:
                with self.together("rest", REST):
                    pass
            except MachineLostError as error:
                self.on_lost(error)
                return


class Leader:
    """Does one model's passes together with the others that have a part of it."""

    def __init__(self, lockstep: Lockstep, key: int) -> None:
        self.lockstep = lockstep
        self.key = key

    def note(self, name: str, *arguments: Any) -> None:
        """Let the others do something with the model before the next pass."""
        self.lockstep.note(name, self.key, *arguments)

    def share(
        self,
        cache: Cache,
        expected_length: int,
        expected_adapters: Sequence[str | None],
        kv_bits: int | None,
    ) -> Cache:
        """Let the others make the cache that has just been made here."""
        shared = SharedCache(cache, self.lockstep, self.lockstep.new_key())
        self.note("cache", shared.key, expected_length, list(expected_adapters), kv_bits)
        return shared

    def run(
        self,
        model: CausalLM,
        input_ids: mx.array,
        cache: Cache | None,
        attention_mask: mx.array | None,
        features: Features | None,
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
        rows = () if features is None else [each for each in features.parts if each is not None]
        mx.eval(rows)  # or else the order of what is computed here would not be the others'
        ids = np.array(input_ids).tolist()
        processes = self.lockstep.processes
        told = ("run", self.key, key, ids, mask, _described(features), outputs)
        with self.lockstep.together(*told):
            for each in rows:
                processes.broadcast_array(each, each.shape, each.dtype)
            return _run(processes, model, input_ids, inner, attention_mask, features, outputs)


class SharedCache(Cache):
    """The leader's view of a cache of which every machine holds its own heads.

    It reads as that on this machine does, and what changes it is told to the others.
    """

    def __init__(self, inner: Cache, lockstep: Lockstep, key: int) -> None:
        # Of a cache's own attributes there are none here: `__getattr__` finds the inner one's.
        self.inner = inner
        self.lockstep = lockstep
        self.key = key

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __del__(self) -> None:
        self.lockstep.note("free", self.key)

    def serves(self) -> bool:
        return self.inner.serves()

    @property
    def state(self) -> list[mx.array]:
        return self.inner.state

    def trim(self, length: int) -> None:
        self.lockstep.note("trim", self.key, length)
        self.inner.trim(length)

    def mark(self) -> None:
        self.lockstep.note("mark", self.key)
        self.inner.mark()

    def expect(
        self,
        lengths: Sequence[int],
        adapters: tuple[str | None, ...] = (),
        loaded: Sequence[str | None] = (),
    ) -> None:
        self.lockstep.note("expect", self.key, list(lengths), list(adapters), list(loaded))
        self.inner.expect(lengths, adapters, loaded)

    def row(self, row: int, length: int) -> Cache:
        found = SharedCache(self.inner.row(row, length), self.lockstep, self.lockstep.new_key())
        self.lockstep.note("row", self.key, row, length, found.key)
        return found

    def part(self) -> None:
        self.lockstep.note("part", self.key)
        self.inner.part()

    def select(self, rows: Sequence[int]) -> None:
        self.lockstep.note("select", self.key, list(rows))
        self.inner.select(rows)

    def join(self, other: Cache) -> None:
        assert isinstance(other, SharedCache)
        self.lockstep.note("join", self.key, other.key)
        self.inner.join(other.inner)


class Follower:
    """Does what the leader does, until that lets it go.

    Attributes:
        models: of which this machine has a part, by the leader's numbers.
    """

    def __init__(self, processes: ProcessGroup) -> None:
        self.processes = processes
        self.models: dict[int, CausalLM] = {}
        self._caches: dict[int, Cache] = {}

    def follow(self) -> None:
        """Follow to the end.

        Raises:
            MachineLostError: where another machine does not answer any more.
        """
        while True:
            for name, *arguments in self.processes.broadcast_json(None):
                if name == "end":
                    return
                try:
                    getattr(self, f"_{name}")(*arguments)
                except MachineLostError:
                    raise
                except PhimlxError:
                    pass  # the leader has it as well, or hears of it, and tells whoever asked

    def _rest(self, seconds: float) -> None:
        time.sleep(seconds)

    def _cache(
        self, model: int, key: int, expected_length: int, adapters: list[Any], kv_bits: int | None
    ) -> None:
        cache = self.models[model].make_cache(expected_length, tuple(adapters), kv_bits)
        self._caches[key] = cache

    def _free(self, key: int) -> None:
        del self._caches[key]

    def _run(
        self,
        model: int,
        key: int | None,
        input_ids: list[list[int]],
        mask: list[list[int]] | None,
        described: Description,
        outputs: int | None,
    ) -> None:
        features = self._features(described)
        cache = None if key is None else self._caches[key]
        attention_mask = None if mask is None else mx.array(mask)
        ids = mx.array(input_ids)
        _run(self.processes, self.models[model], ids, cache, attention_mask, features, outputs)

    def _features(self, described: Description) -> Features | None:
        """Take what the leader's encoders made."""
        if not isinstance(described, list):
            return None if described is None else TEXT
        return Features(
            *(
                None
                if each is None
                else self.processes.broadcast_array(None, tuple(each[0]), getattr(mx, each[1]))
                for each in described
            )
        )

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


Description = str | list[Any] | None
"""Features as they are told before they come: shape and type of each kind; or of none of them."""


def _described(features: Features | None) -> Description:
    if features is None or features is TEXT:
        return None if features is None else "text"
    return [
        None if rows is None else [list(rows.shape), str(rows.dtype).removeprefix("mlx.core.")]
        for rows in features.parts
    ]


def _run(
    processes: ProcessGroup,
    model: CausalLM,
    input_ids: mx.array,
    cache: Cache | None,
    attention_mask: mx.array | None,
    features: Features | None,
    outputs: int | None,
) -> mx.array:
    """Compute hidden states now: sums of two passes must not mix, so none may be left for later."""
    hidden = model.own_hidden_states(input_ids, cache, attention_mask, features, outputs)
    with processes.translate_errors():
        mx.eval(hidden, [] if cache is None else cache.state)
    processes.watchdog.heard()
    return hidden


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of the block: what others are told has to be done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[Any] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {each: signal.signal(each, lambda *given: came.append(given)) for each in numbers}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
    for number, frame in came:
        handler = previous[number]
        if callable(handler):
            handler(number, frame)
        elif handler == signal.SIG_DFL:
            signal.raise_signal(number)
