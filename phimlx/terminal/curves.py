"""A loss curve in characters: eight dots to each, for a terminal of any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

# Dots of a braille cell, by column and row. Source: Unicode 15, chapter 21.1.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
BLANK = 0x2800
MARK = "●"

Curve = Sequence[tuple[int, float]]


def draw(line: Curve, marks: Curve, width: int = 72, height: int = 12) -> str:
    """Some lines of text: a line through the points of one curve, and marks at another's.

    The scale is that of both together. Empty where there are fewer than two points.

    Args:
        line, marks: steps and values, steps ascending.
        width, height: in characters, labels included.
    """
    points = [*line, *marks]
    if len({step for step, _ in points}) < 2:
        return ""
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)
    labels = [f"{high:.3g}", f"{low:.3g}"]
    margin = max(map(len, labels))
    columns, rows = max(8, width - margin - 2), max(2, height - 1)

    def place(step: float, value: float) -> tuple[int, int]:
        """In dots, from the upper left."""
        across = (step - first) / (last - first)
        down = (high - value) / (high - low) if high > low else 0.5
        return round(across * (2 * columns - 1)), round(down * (4 * rows - 1))

    cells: dict[tuple[int, int], int] = {}
    for x, y in _joined([place(*point) for point in line]):
        cell = (x // 2, y // 4)
        cells[cell] = cells.get(cell, 0) | DOTS[x % 2][y % 4]
    found = {(x // 2, y // 4) for x, y in (place(*point) for point in marks)}

    def character(column: int, row: int) -> str:
        if (column, row) in found:
            return MARK
        dots = cells.get((column, row), 0)
        return chr(BLANK + dots) if dots else " "

    lines = []
    for row in range(rows):
        label = {0: labels[0], rows - 1: labels[1]}.get(row, "")
        drawn = "".join(character(column, row) for column in range(columns))
        lines.append(f"{label:>{margin}} ┤{drawn}".rstrip())
    begin, end = str(first), str(last)
    lines.append(" " * (margin + 2) + begin + end.rjust(columns - len(begin)))
    return "\n".join(lines)


def legend(curves: Mapping[str, Curve]) -> str:
    """Explain line and marks, where both are there."""
    return f"loss: ⠒ train, {MARK} validation" if all(curves.values()) else "loss"


def _joined(points: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The dots of straight lines from point to point."""
    found = list(points[:1])
    for (x0, y0), (x1, y1) in pairwise(points):
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        found += [
            (round(x0 + (x1 - x0) * i / steps), round(y0 + (y1 - y0) * i / steps))
            for i in range(1, steps + 1)
        ]
    return found
