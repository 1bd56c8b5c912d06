"""Data files -> rows, one after the other: JSONL, JSON, CSV, TSV, parquet."""

from __future__ import annotations

import codecs
import importlib.util
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NoReturn

from phimlx.errors import TrainingError, shortened
from phimlx.extras import import_extra
from phimlx.files import is_file, read_whole
from phimlx.sizes import counted, size_text

DELIMITERS = (",", ";", "\t", "|")
RECORDS_TRIED = 20  # records after the header that tell one delimiter from another
_LINE = re.compile(r"\r\n?|\n")
_SEP = re.compile(r"sep=([,;\t|])[\r\n]", re.IGNORECASE)  # a first line by which Excel is told
LONGEST_CELL = 1 << 30  # characters of one CSV cell; the csv module's own limit is 131,072
PARQUET_ROWS = 1024  # rows that are in memory at one time, of bytes that are at most
PARQUET_BYTES = 64_000_000
PARQUET_BUFFER = 1 << 20  # bytes of a column that are read at one time

LONGEST_LINE = 16_000_000  # bytes of a row, of which no model takes a tenth

Progress = Callable[[int, int], object]
"""Takes the bytes that have been read, and how many there are."""


@dataclass(frozen=True)
class DataFile:
    """A file and what people call it, which is its path inside the data set.

    `bounds`: the folder that its data set lies in; its own where None.
    """

    path: Path
    name: str
    bounds: Path | None = None


@dataclass(frozen=True)
class Row:
    """A row at `place`, such as "train.jsonl, line 7".

    `data_file`: that it was read from; None where nothing says.
    """

    place: str
    values: dict[str, Any]
    data_file: DataFile | None = field(default=None, compare=False, repr=False)

    @property
    def file(self) -> str:
        """The name of the file that it is in."""
        return self.place.rpartition(",")[0] or self.place


@dataclass(frozen=True)
class Problem:
    """Why what stands at `place` cannot be learned from: a sentence."""

    place: str
    reason: str
    hint: str | None = None

    @property
    def kind(self) -> tuple[str, str]:
        """What it has in common with the same fault of other rows: file and reason."""
        return self.place.rstrip("0123456789").rstrip(), self.reason

    @property
    def number(self) -> str | None:
        """The line or row; None for a file as a whole."""
        found = re.search(r", (?:line|row) (\d+)\Z", self.place)
        return found and found[1]

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class _BadFileError(Exception):
    """The rest of a file cannot be read. `where`: ", line 7", or empty for the file as a whole."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(reason)
        self.where = where


Reader = Callable[[DataFile, int], Iterator[tuple[Row | Problem, int]]]
"""Takes a file and its size; yields what stands in it and how many bytes have been read by then."""


def read_rows(
    files: Iterable[DataFile], on_progress: Progress = lambda done, total: None
) -> Iterator[Row | Problem]:
    """The rows of some files, and in its place what is wrong with one.

    Empty lines of JSONL and CSV are passed over. A byte order mark of UTF-8 is too.

    Raises:
        TrainingError: where a file is not there, cannot be read, or is of a kind without a reader.
    """
    files = list(files)
    readers = [reader_of(file) for file in files]
    sizes = [_size(file) for file in files]
    total, before = sum(sizes), 0
    for file, read, size in zip(files, readers, sizes, strict=True):
        if not size:
            yield Problem(file.name, "The file is empty.")
            continue
        found = False
        try:
            for item, done in read(file, size):
                found = True
                yield replace(item, data_file=file) if isinstance(item, Row) else item
                on_progress(before + min(done, size), total)
        except _BadFileError as error:
            yield Problem(file.name + error.where, str(error))
        except OSError as error:
            raise _unreadable(file, error) from error
        else:
            if not found:
                yield Problem(file.name, "The file holds no rows.")
        before += size
        on_progress(before, total)


def reader_of(file: DataFile) -> Reader:
    """Return the reader of files of that name.

    Raises:
        TrainingError: where nothing does.
    """
    suffix = file.path.suffix.lower()
    if suffix in COMPRESSED:
        raise TrainingError(
            f"{file.name} is compressed.", hint=f"Unpack it: {COMPRESSED[suffix]} {file.path}"
        )
    if suffix not in READERS:
        raise TrainingError(
            f"{file.name} is no data file: its name ends in none of {', '.join(READERS)}.",
            hint="Name it after what it holds, or save it as JSONL: one JSON object on each line.",
        )
    return READERS[suffix]


def _read_jsonl(file: DataFile, size: int) -> Iterator[tuple[Row | Problem, int]]:
    done, blank = 0, True
    with file.path.open("rb") as lines:
        for number, line in enumerate(_divided_at_returns(_bounded(lines)), 1):
            done += len(line)
            if number == 1:
                line = _without_mark(line)
            if not line.strip():
                continue
            item = _read_line(f"{file.name}, line {number}", line)
            if blank and isinstance(item, Problem) and line.lstrip()[:1] == b"[":
                raise _BadFileError(
                    "The file is one JSON list, not a JSON object on each line; "
                    "its name should end in .json."
                )
            blank = False
            yield item, done


def _bounded(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines, none of them longer than any row is."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            size = size_text(LONGEST_LINE)
            raise _BadFileError(f"This is longer than {size}.", f", line {number}")
        yield line


def _divided_at_returns(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines that end with a carriage return alone as the lines that they are."""
    for line in lines:
        if b"\r" in line.rstrip(b"\r\n"):
            yield from line.splitlines(keepends=True)
        else:
            yield line


def _read_line(place: str, line: bytes) -> Row | Problem:
    """A line of JSONL; only the last of a file may lack its line break."""
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        return Problem(place, f"Column {column} is not UTF-8 text.")
    try:
        return _row(place, _parse(text))
    except json.JSONDecodeError as error:
        if not line.endswith((b"\n", b"\r")) and _is_cut(text, error):
            return Problem(place, "The file ends in the middle of this row.")
        return Problem(place, f"No JSON at column {error.colno}: {error.msg}.")
    except (ValueError, RecursionError) as error:
        return Problem(place, _no_json(error))


def _read_json(file: DataFile, size: int) -> Iterator[tuple[Row | Problem, int]]:
    """A list of objects, an object that has one as its `data`, or, however it is named, JSONL."""
    text = _text(file)
    try:
        value = _parse(text)
    except json.JSONDecodeError as error:
        if _is_jsonl(text):
            yield from _read_jsonl(file, size)
            return
        if _is_cut(text, error):
            raise _BadFileError("The file ends in the middle of a value.") from error
        raise _BadFileError(
            f"No JSON at column {error.colno}: {error.msg}.", f", line {error.lineno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _BadFileError(_no_json(error)) from error
    if isinstance(value, dict) and "data" not in value and len(_LINE.split(text.strip())) == 1:
        value = [value]  # JSONL of one line
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise _BadFileError('The file holds neither a list of rows nor {"data": [rows]}.')
    for number, row in enumerate(rows, 1):
        yield _row(f"{file.name}, row {number}", row), size * number // len(rows)


def _read_csv(file: DataFile, size: int, usual: str = ",") -> Iterator[tuple[Row | Problem, int]]:
    text = _text(file)
    named = _SEP.match(text)
    records = _csv_records(text, named[1] if named else _delimiter(text, usual))
    line, lines = 1, max(text.count("\n"), text.count("\r")) + 1
    try:
        if named:
            next(records)
        header = _column_names(next(records, []), records.line_num)
        line = records.line_num + 1
        for cells in records:
            place = f"{file.name}, line {line}"
            line = records.line_num + 1
            done = size * records.line_num // lines
            if not cells:
                continue
            if len(cells) == len(header):
                yield Row(place, dict(zip(header, cells, strict=True))), done
            else:
                found = counted(len(cells), "column")
                yield Problem(place, f"It has {found}, but the header has {len(header)}."), done
    except _csv_with_long_cells().Error as error:
        raise _BadFileError(f"This is no CSV: {error}.", f", line {line}") from error


def _csv_records(text: str, delimiter: str) -> Any:
    """Make a reader of records, whose `line_num` is the line that it has come to."""
    lines = io.StringIO(text, newline="")
    return _csv_with_long_cells().reader(lines, delimiter=delimiter, strict=True)


def _first_records(text: str, delimiter: str) -> list[list[str]]:
    """The header and the records after it, up to one that is none by this delimiter."""
    found: list[list[str]] = []
    with suppress(_csv_with_long_cells().Error):
        found.extend(islice(_csv_records(text, delimiter), RECORDS_TRIED + 1))
    return found


def _delimiter(text: str, usual: str) -> str:
    """Find what parts the columns: what divides the header, and most of the next records alike.

    Where several do, the usual one comes first; where none does, there is one column.
    """
    best, most = usual, (0, False, 0)
    for delimiter in dict.fromkeys((usual, *DELIMITERS)):
        header, *first = _first_records(text, delimiter) or [[]]
        alike = sum(len(cells) == len(header) for cells in first)
        found = (alike, delimiter == usual, len(header))
        if len(header) > 1 and alike and found > most:
            best, most = delimiter, found
    return best


@cache
def _csv_with_long_cells() -> ModuleType:
    """Make an instance of the csv module of our own: its limit on cells is the module's."""
    spec = importlib.util.find_spec("_csv")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.field_size_limit(LONGEST_CELL)
    return module


def _read_tsv(file: DataFile, size: int) -> Iterator[tuple[Row | Problem, int]]:
    return _read_csv(file, size, "\t")


def _column_names(header: Sequence[str], line: int) -> list[str]:
    """Return the names of columns; those without, such as an index, are called as pandas does."""
    if header and not any(name.strip() for name in header):
        raise _BadFileError("No column of the header has a name.", f", line {line}")
    names = [name.strip() or f"Unnamed: {number}" for number, name in enumerate(header)]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise _BadFileError(
            f"The header names the column {shortened(twice)} twice.", f", line {line}"
        )
    return names


def _read_parquet(file: DataFile, size: int) -> Iterator[tuple[Row | Problem, int]]:
    without = f"{file.name} is parquet, which takes a library that is not installed."
    pyarrow = import_extra("pyarrow", "parquet", without, TrainingError)
    parquet_file = import_extra("pyarrow.parquet", "parquet", without, TrainingError).ParquetFile
    number = 0
    try:
        with parquet_file(file.path, buffer_size=PARQUET_BUFFER) as parquet:
            count = parquet.metadata.num_rows
            for batch in parquet.iter_batches(batch_size=_rows_at_once(parquet.metadata)):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{file.name}, row {number}", values), size * number // count
    except (pyarrow.ArrowException, OSError) as error:
        raise _BadFileError("The file is damaged, or no parquet.") from error
    except (OverflowError, ValueError) as error:  # dates beyond the year 9999, texts not in UTF-8
        raise _BadFileError(
            "A value is a date or a text that cannot be read.", f", after row {number}"
        ) from error


def _rows_at_once(about: Any) -> int:
    """Count the rows of a parquet file that are read together: few where they hold pictures."""
    groups = (about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    mean = sum(groups) / max(1, about.num_rows)
    return max(1, min(PARQUET_ROWS, int(PARQUET_BYTES / max(1, mean))))


READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
# What unpacks what is compressed.
COMPRESSED = {
    ".gz": "gunzip",
    ".bz2": "bunzip2",
    ".xz": "unxz",
    ".zst": "unzstd",
    ".zip": "unzip",
}


def _row(place: str, value: Any) -> Row | Problem:
    if isinstance(value, dict):
        return Row(place, value)
    return Problem(place, f"A row is a JSON object, but this is {shortened(value)}.")


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant, parse_int=read_whole)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON.")


def _no_json(error: Exception) -> str:
    """A reason for what the parser raises besides its own error."""
    return "It is nested too deeply." if isinstance(error, RecursionError) else str(error)


def _is_cut(text: str, error: json.JSONDecodeError) -> bool:
    """Whether the parser stopped because the text did."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())


def _is_jsonl(text: str) -> bool:
    """Whether the first line that is not empty is an object of its own."""
    first = next((line for line in _LINE.split(text) if line.strip()), "")
    try:
        return isinstance(_parse(first), dict)
    except (ValueError, RecursionError):
        return False


def _text(file: DataFile) -> str:
    content = _without_mark(file.path.read_bytes())
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _BadFileError("This is not UTF-8 text.", f", line {line}") from error


def _without_mark(start: bytes) -> bytes:
    """The start of a file without UTF-8's byte order mark."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _BadFileError("The file is UTF-16 text; save it as UTF-8.")
    return start.removeprefix(codecs.BOM_UTF8)


def _size(file: DataFile) -> int:
    try:
        if file.path.exists() and not is_file(file.path):  # opening a pipe would wait for ever
            raise TrainingError(f"{file.path} is not a regular file.")
        with file.path.open("rb"):
            return file.path.stat().st_size
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: DataFile, error: OSError) -> TrainingError:
    if isinstance(error, FileNotFoundError):
        return TrainingError(f"There is no file {file.path}.", hint="Check the path.")
    return TrainingError(f"{file.path} cannot be read: {error.strerror or error}.")
