"""How much a template may build: sizes of values, and a budget that they are charged to.

Knows nothing of jinja: the sandbox says what is built, and when.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

Containers = (list, tuple, dict, set, frozenset)

# A number of more than 1233 decimal digits has no place in a prompt.
MAX_INT_BITS = 4096
# Bytes of one short string in a list, its pointer included.
SHORT_STRING = 64
MAX_WIDTH = 1000


class TemplateLimitError(BaseException):
    """A template ran past its budget; not an Exception, so that nothing in between catches it."""


class Meter:
    """A budget in bytes for everything that one run of a template builds.

    Whatever a template makes is charged, also what it drops again, so the budget bounds memory.
    Containers are *weighed*: the bytes they would take if every shared part were a copy, which
    bounds what printing, comparing or hashing them costs. `size` and `limit` are in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.left = limit
        # Templates cannot change a container, so a weight once found stays right; the container
        # is kept alive with it, so that its id stays its own.
        self._weights: dict[int, tuple[int, Any]] = {}

    def charge(self, size: int) -> None:
        """Take `size` bytes from the budget; TemplateLimitError where it does not hold them."""
        self.left -= size
        if self.left < 0:
            raise TemplateLimitError

    def require(self, size: int) -> None:
        """TemplateLimitError where the budget does not hold `size` bytes; charges nothing."""
        if size > self.left:
            raise TemplateLimitError

    def admit(self, value: Any) -> Any:
        """Charge a value that was built, and hand it on."""
        if isinstance(value, str | bytes | int):
            self.charge(sys.getsizeof(value))
        elif isinstance(value, Containers):
            self.charge(sys.getsizeof(value))
            self.weigh(value)
        return value

    def weigh(self, value: Any) -> int:
        """The bytes that `value` takes with every shared part counted as often as it appears."""
        if not isinstance(value, Containers):
            return sys.getsizeof(value) if isinstance(value, str | bytes | int) else SHORT_STRING
        known = self._weights.get(id(value))
        if known is not None:
            return known[0]
        parts = (*value.keys(), *value.values()) if isinstance(value, dict) else value
        weight = sys.getsizeof(value)
        for part in parts:
            weight += self.weigh(part)
            if weight > self.limit:
                raise TemplateLimitError
        self._weights[id(value)] = (weight, value)
        return weight

    def text(self, value: Any) -> str:
        """`str(value)`, charged."""
        if isinstance(value, str):
            self.charge(sys.getsizeof(value))
            return value
        self.weigh(value)
        return str(self.admit(str(value)))

    # Operations that can build far more than they were given, looked at before they run.

    def repeat(self, left: Any, right: Any) -> None:
        """Before `left * right`."""
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | bytes | list | tuple) and isinstance(count, int):
                self.require(_payload(sequence) * max(count, 0))
        self._bits(left, right, lambda a, b: a + b)

    def power(self, left: Any, right: Any) -> None:
        """Before `left ** right`."""
        self._bits(left, right, lambda a, _: a * abs(right))

    def add(self, left: Any, right: Any) -> None:
        """Before `left + right`."""
        if isinstance(left, str | list | tuple):
            self.require(sys.getsizeof(left) + sys.getsizeof(right))

    def percent(self, left: Any, right: Any) -> None:
        """Before `left % right`, which may format text."""
        if isinstance(left, str):
            for width in re.findall(r"%(?:\([^)]*\))?[^a-zA-Z%]*", left):
                if "*" in width or any(int(n[:9]) > MAX_WIDTH for n in re.findall(r"\d+", width)):
                    raise TemplateLimitError
            self.require(sys.getsizeof(left) + left.count("%") * (MAX_WIDTH + self.weigh(right)))

    def join(self, separator: str, items: Iterable[Any]) -> str:
        """`separator.join(items)`, charged."""
        parts = [self.text(item) for item in items]
        self.charge(_payload(separator) * len(parts))
        return separator.join(parts)

    def replace(self, text: str, old: str, new: str) -> None:
        """Before `text.replace(old, new)`."""
        self.require(sys.getsizeof(text) + text.count(old) * _payload(new))

    def split(self, text: str, separators: Iterable[str] | None) -> None:
        """Before `text` is cut at `separators`, or at white space where None."""
        cuts = len(text) // 2 if separators is None else sum(map(text.count, separators))
        self.require(SHORT_STRING * cuts)

    def _bits(self, left: Any, right: Any, bits: Any) -> None:
        if (
            isinstance(left, int)
            and isinstance(right, int)
            and bits(left.bit_length(), right.bit_length()) > MAX_INT_BITS
        ):
            raise TemplateLimitError


def _payload(value: str | bytes | list[Any] | tuple[Any, ...]) -> int:
    """At most how many bytes a copy of the value's items takes inside another."""
    if isinstance(value, str):
        return len(value) * (1 if value.isascii() else 4)
    return len(value) * (1 if isinstance(value, bytes) else 8)


def size_of(value: Any) -> int:
    """The bytes of a tree of mappings, sequences and strings."""
    if isinstance(value, Mapping):
        return SHORT_STRING + sum(size_of(key) + size_of(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return SHORT_STRING + sum(map(size_of, value))
    return sys.getsizeof(value)
