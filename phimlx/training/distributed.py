"""The processes that share a run, as `mlx.launch` started them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from phimlx.errors import TrainingError


class MachineLostError(TrainingError):
    """One of several machines is no longer there."""


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share a run, and this one's place among them.

    Attributes:
        group: what sums and gathers over all of them; None where this one is alone.
    """

    group: mx.distributed.Group | None = None

    @classmethod
    def join(cls) -> ProcessGroup:
        """Find the others, where `mlx.launch` started this process; else be alone."""
        group = mx.distributed.init()
        return cls(group if group.size() > 1 else None)

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
        with self.translate_errors():
            own = np.frombuffer(data if self.is_main else b"", np.uint8)
            length = int(self._sum(mx.array(len(own))))
            row = mx.zeros(length, mx.uint8) if len(own) < length else mx.array(own)
            return np.array(self._sum(row)).tobytes()

    def broadcast_json(self, value: Any) -> Any:
        """Send what JSON can hold, in the same way."""
        if self.group is None:
            return value
        return json.loads(self.broadcast(json.dumps(value).encode()))

    def _sum(self, array: mx.array) -> mx.array:
        summed = mx.distributed.all_sum(array, group=self.group)
        mx.eval(summed)  # which raises where a machine is lost; numpy and item() wait for ever
        return summed

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
                hint="Start the same command again with --resume.",
            ) from error
