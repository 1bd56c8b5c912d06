"""Ctrl-C while a model answers: it ends the reply, not the program."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phimlx.generation.answerer import ReplyStream
    from phimlx.generation.reply import Chunk


class Interruptible:
    """A stream that Ctrl-C closes.

    Once the first chunk is there the interrupt waits for the end of the current token, so that
    model and cache stay whole. Before it, a long prompt may be in the works: the interrupt cuts
    in at once, `cut` is set, and a cache that the stream was filling should be dropped.
    """

    def __init__(
        self, stream: ReplyStream, on_chunk: Callable[[Chunk], None] = lambda chunk: None
    ) -> None:
        """Take a stream; `on_chunk` is called with each chunk before it is handed on."""
        self.stream = stream
        self._on_chunk = on_chunk
        self.interrupted = False
        self.cut = False
        self._begun = False

    def __iter__(self) -> Iterator[Chunk]:
        previous = signal.getsignal(signal.SIGINT)
        if previous is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._interrupt)
        try:
            for chunk in self.stream:
                self._begun = True
                self._on_chunk(chunk)
                yield chunk
                if self.interrupted:
                    break
        except KeyboardInterrupt:
            self.cut = True
        finally:
            try:
                self.stream.close()
            finally:
                signal.signal(signal.SIGINT, previous)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self.interrupted = True
        if not self._begun:
            raise KeyboardInterrupt
