"""What the machines that share a training step do together: each has some of its rows, or a part of
the model's layers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map

from phimlx.machine.reductions import euclidean_norm, long_sum, sum_of_squares
from phimlx.models.base import CausalLM
from phimlx.training.sharded import shared_axes

Tree = dict[str, Any]

NAME_BYTES = 400  # of an example's name, told to the other machines


class Alone:
    """One machine that does all.

    Args:
        rank: its place among those that have other rows.
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def totals(self, array: mx.array) -> list[Any]:
        """The sums of a row of numbers over the rows of all machines."""
        mx.eval(array)  # which raises where a machine is lost; numpy would wait for ever
        return np.array(array).tolist()

    def sum_gradients(self, gradients: Tree) -> Tree:
        """The sums of gradients over the rows of all machines."""
        return gradients

    def norm(self, gradients: Tree) -> float:
        """The Euclidean norm of all gradients together, once they are summed."""
        arrays: dict[str, mx.array] = dict(tree_flatten(gradients))
        norm = euclidean_norm(arrays.values())
        mx.eval(norm)
        return float(norm)

    def first(self, text: str) -> str:
        """The first text that any machine has to tell."""
        return text

    @property
    def apart(self) -> Alone:
        """What looks at this machine's own rows, without those that have others."""
        return self


class SharedRows(Alone):
    """Machines of which each has the whole model, and some rows of each batch."""

    def __init__(self, group: mx.distributed.Group) -> None:
        super().__init__(group.rank())
        self.group = group

    def totals(self, array: mx.array) -> list[Any]:
        return super().totals(mx.distributed.all_sum(array, group=self.group))

    def sum_gradients(self, gradients: Tree) -> Tree:
        size = self.group.size()
        # It joins small arrays, each of which would cost a round through the network.
        summed = tree_map(lambda mean: mean * size, average_gradients(gradients, self.group))
        mx.eval(summed)
        return summed

    def first(self, text: str) -> str:
        row = np.zeros((1, NAME_BYTES), np.uint8)
        letters = text.encode()[:NAME_BYTES]
        row[0, : len(letters)] = np.frombuffer(letters, np.uint8)
        rows = mx.distributed.all_gather(mx.array(row), group=self.group)
        mx.eval(rows)
        texts = (bytes(each).rstrip(b"\0").decode(errors="replace") for each in np.array(rows))
        return next(filter(None, texts), "")

    @property
    def apart(self) -> Alone:
        # What machines exchange on the way would wait for those that are looking at fewer.
        return Alone(self.rank)


class SharedLayers(Alone):
    """Machines of which each has a part of the layers, and all rows.

    What follows from a number is decided by the first one's, should the last digits differ.

    Args:
        shared: names of the parameters of which each has a part.
    """

    def __init__(self, group: mx.distributed.Group, shared: Collection[str]) -> None:
        super().__init__()
        self.group = group
        self.shared = shared

    def totals(self, array: mx.array) -> list[Any]:
        return super().totals(self._of_first(array))

    def norm(self, gradients: Tree) -> float:
        arrays: dict[str, mx.array] = dict(tree_flatten(gradients))
        squares = {name: sum_of_squares(array) for name, array in arrays.items()}
        parts = [each for name, each in squares.items() if name in self.shared]
        whole = [each for name, each in squares.items() if name not in self.shared]
        summed = mx.distributed.all_sum(long_sum(mx.stack(parts)), group=self.group)
        norm = self._of_first(mx.sqrt(long_sum(mx.stack([summed, *whole]))))
        mx.eval(norm)
        return float(norm)

    def _of_first(self, array: mx.array) -> mx.array:
        mx.eval(array)  # on all machines, for parts of the model may have to be summed for it
        own = array if self.group.rank() == 0 else mx.zeros_like(array)
        return mx.distributed.all_sum(own, group=self.group)


def machines_of(model: CausalLM, group: mx.distributed.Group | None) -> Alone:
    """Tell what machines do together that train a model, which `attach` has prepared.

    Args:
        group: None for this one alone.
    """
    if group is None:
        return Alone()
    return SharedRows(group) if model.shares is None else SharedLayers(group, shared_axes(model))
