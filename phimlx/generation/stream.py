"""A reply while it is written."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Self

from phimlx.generation.reply import Chunk, Reply

if TYPE_CHECKING:
    from phimlx.generation.engine import Engine
    from phimlx.generation.request import Request


class ChunkStream(Iterator[Chunk]):
    """The chunks of one reply, wherever they come from; `reply` holds what there is so far."""

    def __init__(self, reply: Reply, chunks: Generator[Chunk]) -> None:
        self.reply = reply
        self._chunks = chunks

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def result(self) -> Reply:
        """Read the reply to its end."""
        for _ in self:
            pass
        return self.reply

    def close(self) -> None:
        """Stop here. The reply stays readable, and the prompt cache usable."""
        self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream(ChunkStream):
    """The chunks of one reply; `reply` holds what there is so far.

    The model starts with the first chunk. Closing the stream early keeps what was said; so does an
    interrupt while a token is awaited, and forgetting the stream.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        super().__init__(request.reply, engine.run(request))
