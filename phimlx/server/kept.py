"""What clients may come back to: kept in memory within limits, the oldest let go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Values by their ids; who is used last goes last.

    Args:
        most: values that are kept.
        most_bytes: that all of them may have together; a larger one is not kept at all.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._values: OrderedDict[str, tuple[Value, int]] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Value]:
        """Go through the values, the latest first."""
        return (value for value, _ in reversed(self._values.values()))

    def put(self, key: str, value: Value, size: int) -> None:
        """Keep a value of so many bytes."""
        self.delete(key)
        if size > self._most_bytes:
            return
        self._values[key] = value, size
        self.nbytes += size
        while len(self._values) > self._most or self.nbytes > self._most_bytes:
            self.delete(next(iter(self._values)))

    def get(self, key: str) -> Value | None:
        """Find a value, which is the latest then; None where it is not kept."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def delete(self, key: str) -> bool:
        """Let go of a value; whether there was one."""
        _, size = self._values.pop(key, (None, -1))
        self.nbytes -= max(size, 0)
        return size >= 0
