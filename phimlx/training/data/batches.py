"""Examples -> batches of few distinct shapes, in an order that seed and epoch decide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from phimlx.training.data.media import MediaItem, beside_each_other
from phimlx.training.loss import CHUNK_ROWS

Rows = Sequence[tuple[int, ...]]  # the numbers of the examples in each row

STEPS_AN_OCTAVE = 16  # how finely sizes are rounded up: at most 1/16 of a batch is padding


@dataclass(frozen=True)
class Task:
    """What a prompt's answers are judged by.

    Attributes:
        prompt: as the row has it: text, or messages.
        expected: the answer that the row has, if any.
        values: the row.
    """

    prompt: Any
    expected: str | None
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """One thing to learn from.

    `tokens` are int32 `[length]`; `supervised` bool `[length]` says which of them the model should
    learn to predict from those before it. The first never is. `source` names the row it came from.
    `desirable`: False of an answer that is not to be given. `task`: of a prompt that the model is
    to answer itself. `media` are its pictures and sounds, in the order of the tokens that they
    fill.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    source: str = ""
    desirable: bool = True
    task: Task | None = None
    media: tuple[MediaItem, ...] = ()

    @property
    def inputs(self) -> int:
        """Count the tokens that are fed: all but the last, which is only a target."""
        return len(self.tokens) - 1

    @property
    def modality(self) -> str:
        """What it holds, by which a model chooses among its own adapters: "image" comes first."""
        kinds = {item.kind for item in self.media}
        return next((kind for kind in ("image", "audio") if kind in kinds), "text")

    @property
    def held(self) -> frozenset[str]:
        """What it holds: "text", "audio", or "image" and with it "image+audio"."""
        both = self.modality == "image" and any(item.kind == "audio" for item in self.media)
        return frozenset({self.modality, *(["image+audio"] if both else [])})

    def beginning(self, length: int) -> Example:
        """Cut all but the first tokens off; a picture or sound is not cut in two."""
        kept = [item for item in self.media if item.begin + item.tokens <= length]
        media = beside_each_other([replace(item, padded=None) for item in kept])
        tokens, supervised = self.tokens[:length], self.supervised[:length]
        return replace(self, tokens=tokens, supervised=supervised, media=media)


@dataclass(frozen=True)
class PlacedItem:
    """A picture or a sound of a batch; `place`: of its first token, in the rows laid end to end."""

    item: MediaItem
    place: int


@dataclass(frozen=True)
class Batch:
    """Input of one pass of the model. Rows hold one example each, or several where packed."""

    tokens: np.ndarray  # int32 [rows, length]
    positions: np.ndarray  # int32 [rows, length], counted from 0 in each example
    segments: np.ndarray | None  # int32 [rows, length]: which example; -1 padding; None: unpacked
    lengths: np.ndarray  # int32 [rows, length]: how many tokens the token's example feeds
    target_indices: np.ndarray  # int32 [n]: where, in the rows laid end to end, it is predicted
    targets: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n]: 1, or 0 for padding
    example_ids: np.ndarray  # int32 [n]: which of `examples` a target belongs to
    numbers: np.ndarray  # int32 [examples]: the number that each has in the data set
    examples: tuple[Example, ...]
    media: tuple[PlacedItem, ...]
    modalities: tuple[str, ...]  # what each row holds, as `Example.modality`; () for text

    @property
    def sources(self) -> tuple[str, ...]:
        """Where each example came from."""
        return tuple(example.source for example in self.examples)

    @property
    def supervised_tokens(self) -> int:
        return int(self.weights.sum())

    @property
    def real_tokens(self) -> int:
        return int((self.lengths > 0).sum())

    def alone(self, *places: int) -> Batch:
        """Some of the examples in a batch of their own, a row each."""
        chosen = [self.examples[place] for place in places]
        shape = len(chosen), max(example.inputs for example in chosen)
        return lay_out(chosen, [(place,) for place in range(len(chosen))], shape)


class Batches:
    """The batches of a data set, the same for the same seed and epoch.

    Args:
        batch_size: rows of a batch, over all machines together.
        row_length: length of every row where examples are packed into rows; None leaves each
            example its own row, in batches of about equal length.
        seed: shuffles, anew each epoch; None keeps the order of lengths, for evaluation.
        rank, ranks: this machine's place among those that share each batch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        row_length: int | None = None,
        seed: int | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.row_length = row_length
        self.seed = seed
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self._rows) // self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from the `start`-th on."""
        for rows in self._order(number)[start:]:
            yield self._build(rows)

    @property
    def real_share(self) -> float:
        """Return the part of the fed tokens that is real, over an epoch in order of length."""
        real = sum(example.inputs for example in self.examples)
        return real / sum(self._fed(rows) for rows in self._order(0))

    @property
    def _units(self) -> Sequence[int]:
        """What stays together, by the number of its first example."""
        return range(len(self.examples))

    @cached_property
    def _rows(self) -> Rows:
        """The units of each row, longest first."""
        order = sorted(self._units, key=lambda i: self._length((i,)), reverse=True)
        if self.row_length is None:
            return [(i,) for i in order]
        rows: list[tuple[int, ...]] = []
        # A row uses one of a model's own adapters, by what it holds.
        for alike in _by_modality(self.examples, order):
            rows += pack([self._length((i,)) for i in alike], self.row_length, alike)
        return rows

    def _order(self, epoch: int) -> list[Rows]:
        """The rows of each batch of an epoch."""
        rows = self._rows
        if self.seed is None:
            return _split(rows, self.batch_size)
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        shuffled = [rows[i] for i in generator.permutation(len(rows))]
        if self.row_length is None:
            # Neighbours in length share a batch; among equals the shuffle decides.
            shuffled.sort(key=self._length, reverse=True)
        batches = _split(shuffled, self.batch_size)
        return [batches[i] for i in generator.permutation(len(batches))]

    def _length(self, row: tuple[int, ...]) -> int:
        """The longest example of a row."""
        return max(self.examples[i].inputs for i in row)

    def _mine(self, rows: Rows) -> Rows:
        """This machine's rows of a batch."""
        return rows[self.rank :: self.ranks]

    def _shape(self, rows: Rows) -> tuple[int, int]:
        """Rows and columns of this machine's part of a batch."""
        if self.row_length is not None:
            return -(-self.batch_size // self.ranks), self.row_length
        return -(-len(rows) // self.ranks), rounded(max(map(self._length, rows)), 8)

    def _fed(self, rows: Rows) -> int:
        count, length = self._shape(rows)
        return count * length * self.ranks

    def _build(self, rows: Rows) -> Batch:
        return lay_out(
            self.examples, self._mine(rows), self._shape(rows), self.row_length is not None
        )


def lay_out(
    examples: Sequence[Example], rows: Rows, shape: tuple[int, int], packed: bool = False
) -> Batch:
    """Make a batch of rows of examples.

    Args:
        rows: the numbers of the examples in each; those that are missing are padding.
        shape: rows and columns.
    """
    tokens, positions, lengths = (np.zeros(shape, np.int32) for _ in range(3))
    segments = np.full(shape, -1, np.int32)
    target_indices: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    example_ids: list[np.ndarray] = []
    numbers: list[int] = []
    media: list[PlacedItem] = []
    modalities = ["text"] * shape[0]
    for place, row in enumerate(rows):
        column = 0
        for number in row:
            example = examples[number]
            here = place, slice(column, column + example.inputs)
            tokens[here] = example.tokens[:-1]
            positions[here] = np.arange(example.inputs)
            lengths[here] = example.inputs
            segments[here] = len(numbers)
            wanted = np.flatnonzero(example.supervised[1:])
            target_indices.append(place * shape[1] + column + wanted)
            targets.append(example.tokens[1 + wanted])
            example_ids.append(np.full(len(wanted), len(numbers)))
            start = place * shape[1] + column
            media += [PlacedItem(item, start + item.begin) for item in example.media]
            modalities[place] = example.modality
            numbers.append(number)
            column += example.inputs
    count = sum(map(len, target_indices))
    padding = np.zeros(rounded(max(count, 1), CHUNK_ROWS) - count, np.int32)
    return Batch(
        tokens,
        positions,
        segments if packed else None,
        lengths,
        np.concatenate([*target_indices, padding]).astype(np.int32),
        np.concatenate([*targets, padding]).astype(np.int32),
        np.repeat(np.array([1, 0], np.float32), [count, len(padding)]),
        np.concatenate([*example_ids, padding]).astype(np.int32),
        np.array(numbers, np.int32),
        tuple(examples[number] for number in numbers),
        tuple(media),
        tuple(modalities) if set(modalities) != {"text"} else (),
    )


def _by_modality(examples: Sequence[Example], order: Sequence[int]) -> list[list[int]]:
    """Part the examples of an order by what they hold, each part in that order."""
    found: dict[str, list[int]] = {}
    for i in order:
        found.setdefault(examples[i].modality, []).append(i)
    return list(found.values())


def pack(lengths: Sequence[int], capacity: int, names: Sequence[int]) -> list[tuple[int, ...]]:
    """Put examples into as few rows as best fit finds.

    Args:
        lengths: longest first, none above the capacity.
        names: what each is called in the result.

    Source: best-fit decreasing; Johnson et al., SIAM J. Comput. 3 (1974).
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins with so much room left
    for name, length in zip(names, lengths, strict=True):
        room = next((room for room in range(length, capacity + 1) if by_room[room]), None)
        if room is None:
            bins.append([])
            chosen, room = len(bins) - 1, capacity
        else:
            chosen = by_room[room].pop()
        bins[chosen].append(name)
        by_room[room - length].append(chosen)
    return [tuple(each) for each in bins]


def rounded(size: int, smallest: int) -> int:
    """The size rounded up to one of few: multiples of `smallest`, ever coarser as it grows."""
    step = max(smallest, 1 << max(size.bit_length() - 1, 0) >> STEPS_AN_OCTAVE.bit_length() - 1)
    return -(-size // step) * step


def _split(rows: Rows, size: int) -> list[Rows]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
