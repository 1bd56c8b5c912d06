"""Data of a given shape out of files: one row a file, in a table or a list, resumable."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from phimlx.errors import PromptError
from phimlx.files import read_text
from phimlx.media.kinds import kind_of
from phimlx.prompt_file import Answers, Line, Parsed, Result, answer_lines, refuse_existing

FORMATS = ("jsonl", "csv")
MAX_TEXT = 16_000_000  # bytes of a text file
TASK = "Read out what this schema asks for, and answer with JSON that is valid under it:"

OPTIONS = {"image": "images", "audio": "audio", "video": "video"}

Schema = Mapping[str, Any]


def extract(
    phi: Answers,
    files: Sequence[str],
    target: Path,
    schema: Schema,
    settings: Mapping[str, Any],
    *,
    form: str = "jsonl",
    task: str = TASK,
    system: str | None = None,
    about: Sequence[str] = (),
    batch_size: int = 8,
    advance: Callable[[int], object] = lambda count: None,
) -> Result:
    """Read data out of files.

    What comes is kept as `phimlx.prompt_file.answer_file` keeps it, so that an interrupted run
    goes on; a file that changed meanwhile is read again. A file that gives no data has a row that
    says why.

    Args:
        files: paths of pictures, sounds and videos, told by the ends of their names, and of texts.
        schema: JSON Schema of a file's data.
        settings: options of every reply.
        form: "jsonl", an object a line with `file` and `data` or `error`; or "csv", a column for
            each property of the schema, values that are no scalars as JSON.
        task: what the model is told; the schema stands below it.
        about: what else a reply depends on, such as the model.

    Raises:
        PromptError: where the output is there already.
        GenerationError: where it cannot be written.
    """
    refuse_existing(target)
    told = f"{task}\n{json.dumps(schema, ensure_ascii=False)}"
    identity = json.dumps([*about, system, told, dict(settings)], sort_keys=True, default=str)

    def parse(line: Line) -> Parsed:
        name = files[line.number - 1]
        content, options = told, {}
        kind = kind_of(name)
        if kind is None:
            content = f"{read_text(Path(name), PromptError, limit=MAX_TEXT)}\n\n{told}"
        else:
            options[OPTIONS[kind]] = [name]
        said = [] if system is None else [{"role": "system", "content": system}]
        return [*said, {"role": "user", "content": content}], options, None, set()

    def encode(rows: Iterator[dict[str, Any]]) -> Iterable[bytes]:
        return ENCODERS[form](_read_out(rows, files, result), schema)

    result = Result()
    found = answer_lines(
        phi,
        list(_lines(files, identity)),
        target,
        {**settings, "schema": schema},
        parse,
        batch_size,
        advance,
        encode,
    )
    found.failed |= result.failed
    found.answered = len(files) - len(found.failed)
    return found


def _lines(files: Sequence[str], identity: str) -> Iterator[Line]:
    """Make a line of each file, known by its contents."""
    seen: Counter[str] = Counter()
    for number, name in enumerate(files, 1):
        digest = hashlib.sha256(identity.encode() + b"\0")
        try:
            with open(name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except (OSError, ValueError):  # which reading it will say
            digest.update(b"unread")
        seen[digest.hexdigest()] += 1
        yield Line(number, b"", f"{digest.hexdigest()}-{seen[digest.hexdigest()]}")


def _read_out(
    rows: Iterator[dict[str, Any]], files: Sequence[str], result: Result
) -> Iterator[dict[str, Any]]:
    """Make a row of each answer; one that was cut holds no data."""
    for row in rows:
        name, error = files[row["line"] - 1], row.get("error")
        if error is None and row["finish_reason"] == "length":
            error = f"The answer was cut after {row['stats']['generated_tokens']} tokens."
            result.failed[row["line"]] = error
        yield {"file": name, "error": error} if error else {"file": name, "data": row["parsed"]}


def _jsonl(rows: Iterator[dict[str, Any]], schema: Schema) -> Iterator[bytes]:
    for row in rows:
        yield json.dumps(row, ensure_ascii=True).encode() + b"\n"


def _csv(rows: Iterator[dict[str, Any]], schema: Schema) -> Iterator[bytes]:
    names = list(schema.get("properties", ()))
    yield _csv_row(["file", *(names or ["data"]), "error"])
    for row in rows:
        data = row.get("data")
        values = [data.get(name) for name in names] if isinstance(data, dict) else [data]
        values += [None] * (len(names) - len(values))
        yield _csv_row([row["file"], *map(_cell, values), row.get("error")])


def _cell(value: Any) -> Any:
    scalar = value is None or isinstance(value, str)
    return value if scalar else json.dumps(value, ensure_ascii=False)


def _csv_row(values: Iterable[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerow(values)
    return text.getvalue().encode("utf-8", "backslashreplace")


ENCODERS = {"jsonl": _jsonl, "csv": _csv}
