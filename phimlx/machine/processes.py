"""The processes that share a run, as `mlx.launch` started them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Event, Thread
from typing import Any

import mlx.core as mx
import numpy as np

from phimlx.errors import MachineLostError

FIRST_PATIENCE = 1800.0  # seconds: each machine reads the data and loads the model meanwhile
PATIENCE = 300.0  # seconds, or so many times the longest wait so far
PATIENCE_FACTOR = 10
SIZE_BYTES, FRAME = 4, 1020  # of a message: its size, and as much of it as goes along
RESUME = "Start the same command again with --resume."
AGAIN = "See that all of them run, then start the same command again."


@dataclass
class Watchdog:
    """Tells that another machine has stopped, where that takes far longer than anything before.

    A process waits for the others inside a call of MLX, which nothing interrupts and which has no
    limit of its own: a machine that is gone closes its connections, one that is stopped does not.
    So a thread looks at the clock.

    Attributes:
        remedy: what to do then.
        idle: whether this process works on its own meanwhile, and waits for nobody.
    """

    remedy: str = RESUME
    idle: bool = False
    patience: float = FIRST_PATIENCE
    longest: float = 0.0
    last: float = field(default_factory=time.monotonic)

    def heard(self) -> None:
        """Note that all machines have just answered."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self.last)
        self.patience = max(PATIENCE, PATIENCE_FACTOR * self.longest)
        self.last = now

    def allow(self, seconds: float) -> None:
        """Wait so long at least until the others answer next."""
        self.patience = max(self.patience, seconds)

    @contextmanager
    def watching(self, on_lost: Callable[[MachineLostError], object]) -> Iterator[None]:
        """Watch while the block runs; `on_lost`, called in a thread, has to end the process."""
        ended = Event()
        self.last = time.monotonic()

        def watch() -> None:
            while not ended.wait(min(5.0, self.patience / 4)):
                if self.idle:
                    self.last = time.monotonic()
                waited = time.monotonic() - self.last
                if waited > self.patience:
                    on_lost(
                        MachineLostError(
                            f"Another machine has not answered for {waited:.0f} seconds, so the "
                            "run ends here.",
                            hint=self.remedy,
                        )
                    )
                    return

        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share a run, and this one's place among them.

    Attributes:
        group: what sums and gathers over all of them; None where this one is alone.
        watchdog: told whenever all of them have answered.
    """

    group: mx.distributed.Group | None = None
    watchdog: Watchdog = field(default_factory=Watchdog, compare=False)

    @classmethod
    def join(cls, remedy: str = RESUME) -> ProcessGroup:
        """Find the others, where `mlx.launch` started this process; else be alone.

        Args:
            remedy: what to do where one of them is lost.
        """
        group = mx.distributed.init()
        return cls(group if group.size() > 1 else None, Watchdog(remedy))

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def any(self, mine: bool) -> bool:
        """Whether it is so on any machine; all ask together."""
        if self.group is None:
            return mine
        return bool(self._sum(mx.array(int(mine))).item())

    def broadcast(self, data: bytes) -> bytes:
        """Send what the main process has to all; they call together."""
        if self.group is None:
            return data
        own = data if self.is_main else b""
        frame = np.zeros(SIZE_BYTES + FRAME, np.uint8)  # so that what is short goes at once
        if self.is_main:
            short = own if len(own) <= FRAME else b""
            head = len(own).to_bytes(SIZE_BYTES, "little") + short
            frame[: len(head)] = np.frombuffer(head, np.uint8)
        with self.translate_errors():
            heard = np.array(self._sum(mx.array(frame))).tobytes()
            length = int.from_bytes(heard[:SIZE_BYTES], "little")
            if length <= FRAME:
                return heard[SIZE_BYTES : SIZE_BYTES + length]
            row = np.frombuffer(own, np.uint8) if self.is_main else np.zeros(length, np.uint8)
            return np.array(self._sum(mx.array(row))).tobytes()

    def broadcast_json(self, value: Any) -> Any:
        """Send what JSON can hold, in the same way."""
        if self.group is None:
            return value
        return json.loads(self.broadcast(json.dumps(value).encode()))

    def broadcast_array(
        self, array: mx.array | None, shape: tuple[int, ...], dtype: mx.Dtype
    ) -> mx.array:
        """Send what the main process has to all, bit for bit; the others have None."""
        if self.group is None:
            assert array is not None
            return array
        with self.translate_errors():
            if array is None:
                array = mx.zeros(shape, dtype)
            return self._sum(array.view(mx.uint8)).view(dtype)

    def gather(self, text: str) -> list[str]:
        """Collect a text from each process, in their order; they call together."""
        if self.group is None:
            return [text]
        own = text.encode()
        with self.translate_errors():
            sizes = np.zeros(self.size, np.int32)
            sizes[self.rank] = len(own)
            ends = np.cumsum(np.array(self._sum(mx.array(sizes))))
            row = np.zeros(int(ends[-1]) + 1, np.uint8)  # never empty
            row[ends[self.rank] - len(own) : ends[self.rank]] = np.frombuffer(own, np.uint8)
            whole = np.array(self._sum(mx.array(row))).tobytes()
        begins = [0, *ends.tolist()]
        return [whole[a:b].decode() for a, b in pairwise(begins)]

    def _sum(self, array: mx.array) -> mx.array:
        summed = mx.distributed.all_sum(array, group=self.group)
        mx.eval(summed)  # which raises where a machine is lost; numpy and item() wait for ever
        self.watchdog.heard()
        return summed

    @contextmanager
    def watched(self, on_lost: Callable[[MachineLostError], object]) -> Iterator[None]:
        """Watch the others while the block runs, where there are any; see `Watchdog.watching`."""
        if self.group is None:
            yield
            return
        with self.watchdog.watching(on_lost):
            yield

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Work together with the others.

        Raises:
            MachineLostError: where one of them does not answer any more.
        """
        try:
            yield
        except RuntimeError as error:
            if self.group is None:
                raise
            raise MachineLostError(
                f"Another of the {self.size} machines is lost, so the run ends here ({error}).",
                hint=self.watchdog.remedy,
            ) from error
