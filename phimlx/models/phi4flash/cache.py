"""What phi4flash layers keep: a state and a convolution's inputs, a window, or every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self, TypeVar

import mlx.core as mx
import numpy as np

from phimlx.errors import CacheError
from phimlx.models.cache.kv import chosen
from phimlx.models.cache.quantized import make_store
from phimlx.models.cache.store import Form, Held, KeysValues, Store
from phimlx.models.phi4flash.config import FULL, Phi4FlashConfig
from phimlx.models.phi4flash.scan import last_state

KEPT = 32  # last tokens of a pass that can be taken back one by one, as those of a draft are
MARKS = 3  # earlier places that a sequence can be taken back to

T = TypeVar("T")

PLACES = "places"

Change = Callable[[mx.array], mx.array]
"""Makes another array of one whose first axis is the batch."""


@dataclass(frozen=True)
class State:
    """What a Mamba layer keeps, and the last steps that led there.

    Attributes:
        columns: what went into the convolution, `[batch, d_conv - 1 + steps, inner]`.
        before: the state before the steps, `[batch, inner, d_state]`.
        delta, inputs, b: of the steps, as `selective_scan` takes them.
        a: as well; the same for all rows.
        state: after the steps, `[batch, inner, d_state]`.
    """

    columns: mx.array
    before: mx.array
    delta: mx.array
    inputs: mx.array
    b: mx.array
    a: mx.array
    state: mx.array

    @classmethod
    def after(
        cls,
        columns: mx.array,
        before: mx.array,
        steps: tuple[mx.array, mx.array, mx.array],
        a: mx.array,
        state: mx.array,
    ) -> State:
        """Make one of the last of a pass; slices are copied, or they would hold all of it."""
        delta, inputs, b = (array + 0 for array in steps)
        return cls(columns + 0, before, delta, inputs, b, a, state)

    @property
    def steps(self) -> int:
        """How many tokens can be taken back."""
        return self.delta.shape[1]

    def back(self, tokens: int) -> State:
        """Take back so many of the steps."""
        left = self.steps - tokens
        delta, inputs, b = self.delta[:, :left], self.inputs[:, :left], self.b[:, :left]
        return State(
            self.columns[:, : self.columns.shape[1] - tokens],
            self.before,
            delta,
            inputs,
            b,
            self.a,
            last_state(self.before, delta, inputs, b, self.a),
        )

    @property
    def start(self) -> State:
        """The state before the steps."""
        return self.of(self.columns[:, : self.columns.shape[1] - self.steps], self.before, self.a)

    @property
    def bare(self) -> State:
        """The same state without steps."""
        return self.of(self.columns[:, self.steps :], self.state, self.a)

    @classmethod
    def of(cls, columns: mx.array, state: mx.array, a: mx.array) -> State:
        """Make one without steps; `columns` are `[batch, d_conv - 1, inner]`."""
        batch, inner, d_state = state.shape
        none, no_b = mx.zeros((batch, 0, inner)), mx.zeros((batch, 0, d_state))
        return cls(columns, state, none, none, no_b, a, state)

    @property
    def arrays(self) -> list[mx.array]:
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def rows(self) -> int:
        return self.state.shape[0]

    def changed(self, change: Change) -> State:
        """Change the rows of the batch."""
        names = [field.name for field in fields(self) if field.name != "a"]
        return replace(self, **{name: change(getattr(self, name)) for name in names})

    def joined(self, other: State) -> State:
        """Put the rows of another one, without steps like this one, below these."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("columns", "state"))
        columns, state = (mx.concatenate(list(pair)) for pair in pairs)
        return State.of(columns, state, self.a)


class Window(NamedTuple):
    """The last keys and values of a windowed layer.

    Attributes:
        keys, values: `[batch, kv_heads, columns, head_dim]`, with room behind the last token.
        first: column of the sequence that their first one is.
    """

    keys: mx.array
    values: mx.array
    first: int

    @property
    def arrays(self) -> list[mx.array]:
        return [self.keys, self.values]

    def cut(self, begin: int, end: int) -> list[mx.array]:
        """Take keys and values of columns of the sequence."""
        return [array[:, :, begin - self.first : end - self.first] for array in self.arrays]

    def between(self, begin: int, end: int, room: int) -> Window:
        """Copy columns of the sequence, with room for more behind them."""
        batch, heads, _, width = self.keys.shape
        buffers = []
        for array in self.cut(begin, end):
            buffer = mx.zeros((batch, heads, end - begin + room, width), array.dtype)
            buffer[:, :, : end - begin] = array
            buffers.append(buffer)
        return Window(buffers[0], buffers[1], begin)

    def without(self, first: int) -> Window:
        """Forget the first columns of the sequence."""
        begin = max(first, self.first)
        keys, values = self.cut(begin, self.first + self.keys.shape[2])
        return Window(keys, values, begin - first)

    def last(self, end: int, columns: int) -> list[mx.array]:
        """Take those of the last columns before `end`, zeros in front where there are fewer."""
        begin = max(self.first, end - columns)
        missing = columns - (end - begin)
        return [
            mx.pad(array, [(0, 0), (0, 0), (missing, 0), (0, 0)]) for array in self.cut(begin, end)
        ]

    def changed(self, change: Change) -> Self:
        """Change the rows of the batch."""
        return self._replace(keys=change(self.keys), values=change(self.values))


class Mark(NamedTuple):
    """A place in a sequence, with what has to be kept to go on from there."""

    length: int
    states: dict[int, State]
    windows: dict[int, Window]

    def changed(self, change: Change) -> Mark:
        """Change the rows of the batch."""
        states = {layer: state.changed(change) for layer, state in self.states.items()}
        windows = {layer: window.changed(change) for layer, window in self.windows.items()}
        return Mark(self.length, states, windows)


class FlashStore(Store):
    """What all layers of a phi4flash model keep, by the layer's number.

    Keys and values of the full layer are in a store of their own. A state goes back over the last
    steps of a pass, or to a mark.

    Args:
        kv_bits: 8 or 4, to hold the full layer's keys and values quantized; as they come where
            None.

    Attributes:
        ended: for each row whether it ends with padding; empty where none does.

    Raises:
        GenerationError: where they cannot be quantized so.
    """

    def __init__(self, config: Phi4FlashConfig, kv_bits: int | None = None) -> None:
        super().__init__(0)
        self.kv_bits = kv_bits
        self.window = config.window
        self.ended: tuple[bool, ...] = ()
        self._full = make_store(1, config.head_dim, kv_bits)
        self._full_layer = config.kinds.index(FULL)
        self._length = 0  # columns that the states have seen
        self._states: dict[int, State] = {}
        self._windows: dict[int, Window] = {}
        self._marks: list[Mark] = []

    def state(self, layer: int) -> State | None:
        """Give what a Mamba layer keeps; None before the first token."""
        return self._states.get(layer)

    def put_state(self, layer: int, state: State, length: int) -> None:
        """Keep a Mamba layer's state after so many columns."""
        self._states[layer] = state
        self._length = length

    def append(self, layer: int, begin: int, keys: mx.array, values: mx.array) -> Held:
        """Write new keys and values of the full layer, or of a windowed one.

        Returns:
            Those of every column; of a windowed layer from the first column on that the first new
            token attends to.
        """
        if layer == self._full_layer:
            return self._full.append(0, begin, keys, values)
        return self._append_to_window(layer, begin, keys, values)

    def _append_to_window(
        self, layer: int, begin: int, keys: mx.array, values: mx.array
    ) -> KeysValues:
        end, most = begin + keys.shape[2], self.window - 1 + KEPT
        held = self._windows.get(layer, Window(keys[:, :, :0], values[:, :, :0], begin))
        seen = max(held.first, begin - self.window + 1)
        if end - held.first <= held.keys.shape[2]:
            for array, more in zip(held.arrays, (keys, values), strict=True):
                array[:, :, begin - held.first : end - held.first] = more
            self._windows[layer] = held
            return KeysValues(*held.cut(seen, end))
        first = max(held.first, begin - most)
        old_keys, old_values = held.cut(first, begin)
        joined = Window(
            mx.concatenate([old_keys, keys], axis=2),
            mx.concatenate([old_values, values], axis=2),
            first,
        )
        kept = max(first, end - most)
        steps = -(-(end - kept) // self.step) * self.step
        room = min(most + self.step, steps) - (end - kept)
        self._windows[layer] = joined.between(kept, end, room)
        return KeysValues(*joined.cut(seen, end))

    def reserve(self, columns: int, kept: int) -> None:
        self._full.reserve(columns, kept)

    def trim(self, columns: int) -> int:
        self._marks = [mark for mark in self._marks if mark.length <= columns]
        if columns >= self._length:
            return columns
        back = self._length - columns
        if all(state.steps >= back for state in self._states.values()):
            self._states = {layer: state.back(back) for layer, state in self._states.items()}
            self._length = columns
        elif self._marks:
            mark = self._marks[-1]
            self._length = mark.length
            self._states, self._windows = dict(mark.states), dict(mark.windows)
        else:
            self._forget()
        return self._length

    def mark(self) -> None:
        """Keep the place before the last steps, of a batch of one row."""
        state = next(iter(self._states.values()))
        length = self._length - state.steps
        if state.rows > 1 or length <= (self._marks[-1].length if self._marks else 0):
            return
        states = {layer: state.start for layer, state in self._states.items()}
        self._marks = [*self._marks, Mark(length, states, dict(self._windows))][-MARKS:]

    def clear(self) -> None:
        self._full.clear()
        self._forget()
        self.ended = ()

    def _forget(self) -> None:
        self._length, self._states, self._windows, self._marks = 0, {}, {}, []

    def select(self, rows: Sequence[int]) -> None:
        index = mx.array(list(rows))
        self._full.select(rows)
        self.ended = chosen(self.ended, rows)
        self._change(lambda array: array[index])

    def _change(self, change: Change) -> None:
        """Change the rows of the batch."""
        self._marks = []
        _, self._states, self._windows = self._now.changed(change)
        mx.eval(self._kept)

    def row(self, row: int, columns: np.ndarray) -> FlashStore:
        found = copy(self)
        found._full = self._full.row(row, columns)
        first = int(columns[0]) if len(columns) else 0
        found._length = self._length - first
        found.ended = chosen(self.ended, [row])

        def own(array: mx.array) -> mx.array:
            return array[row : row + 1]

        now, *marks = (mark.changed(own) for mark in (self._now, *self._marks))
        found._states = now.states
        found._windows = {layer: window.without(first) for layer, window in now.windows.items()}
        found._marks = [] if first else marks
        return found

    def copy_columns(self, columns: int) -> None:
        self._full.copy_columns(columns)
        now, *self._marks = (mark.changed(lambda x: x + 0) for mark in (self._now, *self._marks))
        self._states, self._windows = now.states, now.windows
        mx.eval(self._kept)

    @property
    def _now(self) -> Mark:
        return Mark(self._length, self._states, self._windows)

    def drop_columns(self, first: int) -> None:
        self._full.drop_columns(first)
        self._marks = []
        self._length -= first
        self._windows = {layer: each.without(first) for layer, each in self._windows.items()}

    def join(self, length: int, other: Store, other_length: int) -> None:
        assert isinstance(other, FlashStore)
        rows, others = (next(iter(each._states.values())).rows for each in (self, other))
        self.ended = (self.ended or (False,) * rows) + (other.ended or (False,) * others)
        self._full.join(length, other._full, other_length)
        end = max(length, other_length)
        columns = min(self.window - 1, end)
        for layer, window in self._windows.items():
            pairs = zip(
                window.last(length, columns),
                other._windows[layer].last(other_length, columns),
                strict=True,
            )
            keys, values = (mx.concatenate(list(pair)) for pair in pairs)
            self._windows[layer] = Window(keys, values, end - columns)
        for layer, state in self._states.items():
            self._states[layer] = state.bare.joined(other._states[layer].bare)
        self._length, self._marks = end, []
        mx.eval(self._kept)
        other.clear()

    def forms(self, columns: int) -> dict[str, Form]:
        full = self._full.forms(columns)
        beside = {name: Form(array.shape, array.dtype) for name, array in self._places()}
        return {**_renumbered(full, self._full_layer), **beside}

    def parts(self, columns: int) -> Iterator[tuple[str, mx.array]]:
        """As in `Store`; of states and windows there are those of the marks too, the last first."""
        yield from _renumbered(dict(self._full.parts(columns)), self._full_layer).items()
        yield from self._places()

    def _places(self) -> Iterator[tuple[str, mx.array]]:
        marks = [self._now, *reversed(self._marks)]
        missing = 1 + MARKS - len(marks)
        yield PLACES, mx.array([mark.length for mark in marks] + [0] * missing, mx.int32)

        def stacked(arrays: list[mx.array]) -> mx.array:  # [places, …], of no row twice
            return mx.concatenate([*arrays, *[mx.zeros_like(arrays[0])] * missing])

        for layer in self._states:
            states = [mark.states[layer].bare for mark in marks]
            yield f"states.{layer}.columns", stacked([state.columns for state in states])
            yield f"states.{layer}.state", stacked([state.state for state in states])
            yield f"states.{layer}.a", states[0].a
        for layer in self._windows:
            kept = [mark.windows[layer].last(mark.length, self.window - 1) for mark in marks]
            for name, arrays in zip(("keys", "values"), zip(*kept, strict=True), strict=True):
                yield f"windows.{layer}.{name}", stacked(list(arrays))

    def restore(self, parts: Mapping[str, mx.array], columns: int) -> None:
        lengths: list[int] = parts[PLACES].tolist()  # type: ignore[assignment]
        if lengths[0] != columns or sorted(lengths, reverse=True) != lengths or lengths[-1] < 0:
            raise CacheError("The file of a prompt cache is damaged: its places are no sense.")
        self.clear()
        full = {name: array for name, array in parts.items() if name.startswith("layers.")}
        self._full.restore(_renumbered(full, 0), columns)
        layers = {
            kind: [int(name.split(".")[1]) for name in parts if name.startswith(kind)]
            for kind in ("states.", "windows.")
        }
        marks = []
        for place, length in enumerate(lengths):
            here = slice(place, place + 1)
            first = max(0, length - self.window + 1)
            states = {
                layer: State.of(
                    parts[f"states.{layer}.columns"][here],
                    parts[f"states.{layer}.state"][here],
                    parts[f"states.{layer}.a"],
                )
                for layer in layers["states."]
            }
            unused = self.window - 1 - length + first
            windows = {
                layer: Window(
                    parts[f"windows.{layer}.keys"][here, :, unused:],
                    parts[f"windows.{layer}.values"][here, :, unused:],
                    first,
                )
                for layer in layers["windows."]
            }
            marks.append(Mark(length, states, windows))
        now, *earlier = marks
        self._length, self._states, self._windows = now
        self._marks = [mark for mark in reversed(earlier) if mark.length]

    @property
    def _kept(self) -> list[mx.array]:
        """Arrays of states and windows, those of marks too."""
        kept = [
            array
            for mark in (self._now, *self._marks)
            for kind in (mark.states, mark.windows)
            for held in kind.values()
            for array in held.arrays
        ]
        return list({id(array): array for array in kept}.values())

    @property
    def arrays(self) -> list[mx.array]:
        return [*self._full.arrays, *self._kept]


def _renumbered(parts: Mapping[str, T], layer: int) -> dict[str, T]:
    """Name the arrays of the only layer of a store after another layer."""
    return {f"layers.{layer}.{name.split('.')[2]}": part for name, part in parts.items()}
