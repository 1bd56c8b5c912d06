"""The log of a run: each event that is kept as a line of JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phimlx.errors import TrainingError
from phimlx.files import parse_json_object, read_bytes, write_file
from phimlx.training.run.checkpoints import writing
from phimlx.training.run.events import Event, SampleReply, TrainingReport, Validation

KINDS: dict[type[Any], str] = {
    TrainingReport: "train",
    Validation: "validation",
    SampleReply: "sample",
}
"""Events that are kept, and what a row calls them."""

Row = dict[str, Any]

MAX_LOG_BYTES = 1 << 30
HINT = "Mend it, or choose another --log."
Curve = Sequence[tuple[int, float]]
"""Steps and losses."""


def row_of(event: Event) -> Row | None:
    """Return an event as it is logged; None for one that is not."""
    kind = KINDS.get(type(event))
    return None if kind is None else {"kind": kind, **asdict(event)}


class TrainingLog:
    """A file of rows, each on the disk before the next thing happens.

    Args:
        step: rows after this one are taken out: a resumed run will write them again.
    """

    def __init__(self, path: Path, step: int = 0, resumed: bool = False) -> None:
        self.path = path
        self.rows: list[Row] = []
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if resumed and path.exists():
                self.rows = [row for row in _rows(path) if row["step"] <= step]
                # Of a run that has taken no step yet nothing was kept.
                self.rows = self.rows if step else []
                write_file(path, "".join(map(_line, self.rows)))
            elif path.exists():
                raise TrainingError(
                    f"{path} exists already.", hint="Choose another --log, or remove it first."
                )

    def add(self, row: Row) -> None:
        """Append a row; raises TrainingError where it cannot be written."""
        self.rows.append(row)
        line = _line(row).encode()
        with writing(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                before = os.fstat(descriptor).st_size
                try:
                    if os.write(descriptor, line) < len(line):
                        os.write(descriptor, line[os.fstat(descriptor).st_size - before :])
                except OSError:
                    os.ftruncate(descriptor, before)  # no half lines
                    raise
            finally:
                os.close(descriptor)

    def curves(self) -> dict[str, Curve]:
        """Return training and validation loss."""
        return {
            kind: [(row["step"], row["loss"]) for row in self.rows if row["kind"] == kind]
            for kind in ("train", "validation")
        }


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _rows(path: Path) -> list[Row]:
    """Read the rows of a file; what a killed run left half written at its end does not count."""
    data = read_bytes(path, TrainingError, hint=HINT, limit=MAX_LOG_BYTES)
    *lines, _half = data.split(b"\n")
    return [_row(f"{path}, line {number}", line) for number, line in enumerate(lines, 1)]


def _row(place: str, line: bytes) -> Row:
    row = parse_json_object(line, place, TrainingError, hint=HINT)
    number, loss = row.get("step"), row.get("loss", 0.0)
    known = row.get("kind") in KINDS.values() and type(number) is int and number >= 0
    try:
        _line(row).encode()  # as it will be written again
    except (ValueError, RecursionError):
        known = False
    if not known or type(loss) not in (int, float):
        raise TrainingError(f"{place} is no row of a run's log.", hint=HINT)
    return row
