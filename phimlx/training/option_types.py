"""What an option of a training run accepts, told once for flags and files.

Knows values as people write them; knows nothing of what they are for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Kind(Protocol):
    """What an option accepts."""

    @property
    def metavar(self) -> str:
        """What stands for it in help."""

    @property
    def what(self) -> str:
        """It must be …"""

    def read(self, value: Any) -> Any:
        """The value as it is kept; raises ValueError where it is none."""


@dataclass(frozen=True)
class Number:
    """A finite number within bounds; `whole` for integers."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False  # the least itself is not allowed
    below: bool = False  # nor the most
    whole: bool = False
    metavar: str = "N"

    @property
    def what(self) -> str:
        bounds = []
        if self.least > -math.inf:
            bounds.append(f"above {self.least:g}" if self.above else f"{self.least:g} or more")
        if self.most < math.inf:
            bounds.append(f"below {self.most:g}" if self.below else f"{self.most:g} at most")
        return ("a whole number" if self.whole else "a number") + "".join(f", {b}" for b in bounds)

    def read(self, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        # YAML 1.1 reads 1e-4 as a text.
        number = int(value) if self.whole and not isinstance(value, float) else float(value)
        if self.whole and number != int(number):
            raise ValueError
        low = number > self.least if self.above else number >= self.least
        high = number < self.most if self.below else number <= self.most
        if not (math.isfinite(number) and low and high):
            raise ValueError
        return int(number) if self.whole else number


@dataclass(frozen=True)
class Word:
    """One of a few words."""

    choices: tuple[str, ...]

    @property
    def metavar(self) -> str:
        return "|".join(self.choices)

    @property
    def what(self) -> str:
        return f"one of {', '.join(self.choices)}"

    def read(self, value: Any) -> str:
        if value not in self.choices:
            raise ValueError
        return str(value)


@dataclass(frozen=True)
class Switch:
    """Yes or no."""

    metavar: str = ""
    what: str = "true or false"

    def read(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclass(frozen=True)
class Text:
    """Text of at least one character."""

    metavar: str = "TEXT"
    what: str = "a text"

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError
        return value


@dataclass(frozen=True)
class Several:
    """A list, on the command line and where a file gives a text joined by commas."""

    item: Kind

    @property
    def metavar(self) -> str:
        return f"{self.item.metavar},…"

    @property
    def what(self) -> str:
        return f"a list, each {self.item.what}"

    def read(self, value: Any) -> tuple[Any, ...]:
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, Iterable) or isinstance(value, Mapping):
            raise ValueError
        return tuple(self.item.read(item) for item in value)


@dataclass(frozen=True)
class Span:
    """First and last of a range: `8-23`, or a list of the two in a file."""

    metavar: str = "A-B"
    what: str = "a range such as 8-23"

    def read(self, value: Any) -> tuple[int, int]:
        first, last = value.split("-") if isinstance(value, str) else value
        if isinstance(first, bool | float) or isinstance(last, bool | float):
            raise ValueError
        if not 0 <= int(first) <= int(last):
            raise ValueError
        return int(first), int(last)


@dataclass(frozen=True)
class Pairs:
    """Names for names: `a=b`, several joined by commas; a table in a file."""

    metavar: str = "NAME=COLUMN,…"
    what: str = "pairs such as prompt=question"

    def read(self, value: Any) -> tuple[tuple[str, str], ...]:
        if isinstance(value, str):
            value = value.split(",")
        if isinstance(value, Mapping):
            value = value.items()
        found = []
        for pair in value:
            name, column = pair.split("=", 1) if isinstance(pair, str) else pair
            if not (isinstance(name, str) and isinstance(column, str) and name and column):
                raise ValueError
            found.append((name.strip(), column.strip()))
        return tuple(found)
