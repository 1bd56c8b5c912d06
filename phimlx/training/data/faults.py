"""What is wrong with rows of data: each fault told once, with the first rows that have it."""

from __future__ import annotations

from bisect import bisect
from itertools import accumulate

from phimlx.errors import TrainingError, clipped
from phimlx.training.data.rows import Problem

SHOWN = 20  # faults that are kept apart and told; the others are counted
FIRST = 3  # rows of a fault that are named
LONGEST = 1200  # characters of all that are told


class Faults:
    """Faults of rows.

    Attributes:
        count: how many rows have one.
    """

    def __init__(self) -> None:
        self.count = 0
        self._alike: dict[tuple[str, str], Alike] = {}

    def note(self, problem: Problem, count: int = 1) -> None:
        """Count so many rows with a problem, and keep it where it is one of the first."""
        self.count += count
        same = self._alike.get(problem.kind)
        if same is None and len(self._alike) < SHOWN:
            same = self._alike[problem.kind] = Alike()
        if same is not None:
            same.note(problem, count)

    def include(self, other: Faults) -> None:
        """Count those of other files too."""
        self.count += other.count - sum(same.count for same in other.kinds)
        for same in other.kinds:
            *others, last = same.first
            for problem in others:
                self.note(problem, 1)
            self.note(last, same.count - len(others))

    @property
    def kinds(self) -> list[Alike]:
        """Those that are kept apart, in their order."""
        return list(self._alike.values())

    @property
    def problems(self) -> list[Problem]:
        """The first rows of each."""
        return [problem for same in self.kinds for problem in same.first]


class Alike:
    """Rows of a file with the same fault: the first of them, and how many they are."""

    def __init__(self) -> None:
        self.first: list[Problem] = []
        self.count = 0

    def note(self, problem: Problem, count: int) -> None:
        """Count a row, and keep it where it is one of the first."""
        self.count += count
        if len(self.first) < FIRST:
            self.first.append(problem)

    def __str__(self) -> str:
        problem = self.first[0]
        if self.count == 1 or problem.number is None:
            return clipped(str(problem))
        numbers = ", ".join(str(each.number) for each in self.first)
        more = self.count - len(self.first)
        numbers += f" and {more:,} more" if more else ""
        return clipped(f"{problem.kind[0]}s {numbers}: {problem.reason}")


class DataError(TrainingError):
    """Rows that cannot be learned from.

    Attributes:
        problems: the first of each kind.
        count: how many there are.
    """

    def __init__(self, faults: Faults) -> None:
        self.problems, self.count = faults.problems, faults.count
        told = [str(same) for same in faults.kinds]
        message = told[0]
        if self.count > 1:
            ends = list(accumulate(map(len, told)))
            told = told[: max(1, bisect(ends, LONGEST))]
            lines = [f"The data has {self.count:,} faults:", *told]
            rest = self.count - sum(same.count for same in faults.kinds[: len(told)])
            if rest:
                lines.append(f"… and {rest:,} more.")
            message = "\n  ".join(lines)
        hints = {problem.hint for problem in self.problems}
        usual = "Mend what is named, or leave it out of the data."
        super().__init__(message, (hints.pop() if len(hints) == 1 else None) or usual)
