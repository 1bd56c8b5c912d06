"""A machine's shares of a model's projections, where several machines share its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx


@dataclass(frozen=True)
class Share:
    """This machine's part of a projection.

    Attributes:
        group: the machines that share it.
        by_rows: whether each has rows of the weight, which is outputs; columns, which is inputs,
            where False.
        pieces: how many of each piece of a fused projection this machine has, in their order.
    """

    group: mx.distributed.Group
    by_rows: bool
    pieces: tuple[int, ...]

    def part(self, whole: mx.array, axis: int) -> mx.array:
        """Take this machine's part of an array that has the rows or columns along an axis."""
        size, rank = self.group.size(), self.group.rank()
        pieces = mx.split(whole, self.borders, axis)
        return mx.concatenate([mx.split(each, size, axis)[rank] for each in pieces], axis)

    def whole(self, part: mx.array, axis: int) -> mx.array:
        """Put the parts of all machines together again; they call it together."""
        parts = mx.distributed.all_gather(part[None], group=self.group)  # [machines, …]
        pieces = mx.split(parts, self._borders, axis + 1)
        return mx.concatenate([mx.concatenate(list(each), axis) for each in pieces], axis)

    def whole_shape(self, part: mx.array, axis: int) -> tuple[int, ...]:
        """Tell the shape of what `whole` makes of a part."""
        size = self.group.size()
        return tuple(n * size if i == axis else n for i, n in enumerate(part.shape))

    @property
    def borders(self) -> list[int]:
        """Where the pieces of the whole end, but for the last."""
        return [self.group.size() * border for border in self._borders]

    @property
    def _borders(self) -> list[int]:
        """Where the pieces of a part end, but for the last."""
        return list(accumulate(self.pieces))[:-1]


@dataclass(frozen=True)
class Shares:
    """What this machine has of a model.

    Attributes:
        group: the machines that share the model.
        projections: its shares, by the projection's path in a decoder layer.
    """

    group: mx.distributed.Group
    projections: Mapping[str, Share]
