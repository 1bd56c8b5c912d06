"""Wired limit and peak memory while something computes: both are the process's, and shared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import mlx.core as mx


class MemoryUse:
    """Memory that the process came to hold while one computation was active."""

    def __init__(self) -> None:
        self._noted = 0
        self._active = True

    @property
    def peak(self) -> int:
        """Bytes, from the beginning of the computation until now or its end."""
        return max(self._noted, mx.get_peak_memory()) if self._active else self._noted

    def note(self, ended: bool = False) -> None:
        """Keep the peak so far, before MLX's is reset or the computation ends."""
        self._noted, self._active = self.peak, not ended


class ActiveMemory:
    """Keeps weights resident while anything computes, and tells each computation its peak.

    MLX has one wired limit and one peak for a process. So computations are counted: the first to
    begin raises the limit, the last to end restores what was there before, in whatever order they
    come and go.
    """

    def __init__(self) -> None:
        self._active: set[MemoryUse] = set()
        self._lock = RLock()  # a forgotten stream may end one anywhere
        self._limit_before = 0

    def begin(self) -> MemoryUse:
        """Count one computation more; `end` is called with what this returns."""
        with self._lock:
            for other in list(self._active):
                other.note()
            mx.reset_peak_memory()
            if not self._active and mx.metal.is_available():
                limit = int(mx.device_info()["max_recommended_working_set_size"])
                self._limit_before = mx.set_wired_limit(limit)
            use = MemoryUse()
            self._active.add(use)
        return use

    def end(self, use: MemoryUse) -> None:
        """Count one computation less; nothing where it has ended before."""
        with self._lock:
            if use not in self._active:
                return
            use.note(ended=True)
            self._active.remove(use)
            if not self._active and mx.metal.is_available():
                mx.synchronize()
                mx.set_wired_limit(self._limit_before)

    @contextmanager
    def held(self) -> Iterator[MemoryUse]:
        """Count a computation for as long as a block runs."""
        use = self.begin()
        try:
            yield use
        finally:
            self.end(use)


ACTIVE_MEMORY = ActiveMemory()
"""The process's own."""
