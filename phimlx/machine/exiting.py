"""Threads that compute, at the interpreter's end: what has begun is waited for, no more begins.

A thread that wants Python's lock once Python has ended is made to exit, by unwinding. In MLX's C++,
or where MLX clears up behind a thread, that aborts the process ("terminate called without an active
exception"). So threads that have computed are held where they want nothing any more.
"""

from __future__ import annotations

import atexit
import time
from collections import Counter
from contextlib import ContextDecorator
from threading import Condition, Event, enumerate, get_ident

PATIENCE = 10.0  # seconds for what has begun
GRACE = 0.5  # for threads that have computed to begin again, where they are held
CLEARING = 0.05  # for MLX to clear up behind those that have ended


class Computing(ContextDecorator):
    """Knows the threads that compute: those that are in the block, and that have been in it."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._depth: Counter[int] = Counter()  # of each thread that has been in the block
        self._held: set[int] = set()
        self._last: int | None = None  # the thread in which the interpreter ends

    def __enter__(self) -> None:
        thread = get_ident()
        with self._changed:
            if self._last in (None, thread) or self._depth[thread]:
                self._depth[thread] += 1
                return
        self.hold()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._depth[get_ident()] -= 1
            self._changed.notify_all()

    def hold(self) -> None:
        """Let this thread stand still for ever, as nobody waits for a daemon thread."""
        with self._changed:
            self._held.add(get_ident())
            self._changed.notify_all()
        Event().wait()

    def close(self) -> None:
        """Hold every thread but this one; returns when they are, or take their time."""
        with self._changed:
            self._last = get_ident()
            self._changed.wait_for(
                lambda: not any(self._depth[each] for each in self._others), PATIENCE
            )
            self._changed.wait_for(lambda: not self._others, GRACE)
            ended = self._depth.keys() - self._held - self._others - {self._last}
        if ended:
            time.sleep(CLEARING)

    @property
    def _others(self) -> set[int]:
        """The threads that have computed and are not held."""
        alive = {thread.ident for thread in enumerate()} - {self._last}
        return {each for each in self._depth if each in alive} - self._held


COMPUTING = Computing()
atexit.register(COMPUTING.close)
