"""Small files, read and written whole: the one JSON reader and the one atomic writer.

Reading has a size limit and takes regular files only: a pipe in a model's folder would never end.
A write appears under its name when all of it is on the disk, with the permissions that the user's
umask gives to any new file, or the old contents stay.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from phimlx.errors import ConfigError, PhimlxError, clipped
from phimlx.sizes import size_text

MAX_BYTES = 64_000_000  # Phi-4-mini's tokenizer.json has 16 MB

_LARGEST = int(sys.float_info.max)
_MOST_VALUES = 200_000  # in a file of settings
# A dotted key of TOML, whose reader takes the square of its length.
_PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')\s*\.\s*"""
_MANY_PARTS = re.compile(rf"(?:^|[\[{{,])[ \t]*(?:{_PART}){{64}}", re.MULTILINE)

# What opening a pipe, socket or device without its other end, or its driver, raises.
_NOT_REGULAR = (errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP)
_NO_LINK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_bytes(
    path: Path,
    error: type[PhimlxError] = ConfigError,
    *,
    hint: str | None = None,
    limit: int = MAX_BYTES,
) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        error: one sentence, and `hint`, where the file is missing, unreadable, too large, or a
            folder, pipe, socket or device.
    """
    with _opened(path, error, hint) as (file, size):
        data = file.read() if size <= limit else None
    if data is None or len(data) > limit:
        raise error(f"{path} is larger than {size_text(limit)}.", hint)
    return data


def read_beginning(
    path: Path, limit: int, error: type[PhimlxError] = ConfigError, *, hint: str | None = None
) -> tuple[bytes, int]:
    """Read the first `limit` bytes of a regular file of any size, and that size.

    Raises `error` as `read_bytes`.
    """
    with _opened(path, error, hint) as (file, size):
        return file.read(min(limit, size)), size


@contextmanager
def _opened(
    path: Path, error: type[PhimlxError], hint: str | None
) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file, and give its size; raise `error` where it cannot be read."""
    place = clipped(str(path))
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
            yield file, status.st_size
    except (FileNotFoundError, ValueError):  # a NUL names nothing
        raise error(f"There is no file {place}.", hint) from None
    except OSError as failure:
        if failure.errno in _NOT_REGULAR:
            raise error(f"{place} is not a regular file.", hint) from failure
        raise error(f"{place} cannot be read: {reason(failure)}.", hint) from failure


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe that nobody writes to would otherwise wait for ever."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def read_text(
    path: Path,
    error: type[PhimlxError] = ConfigError,
    *,
    hint: str | None = None,
    limit: int = MAX_BYTES,
) -> str:
    """Read a file of UTF-8 text, without its byte order mark; raises `error` as `read_bytes`."""
    try:
        return read_bytes(path, error, hint=hint, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{path} is not UTF-8 text.", hint) from failure


def read_json_value(
    path: Path,
    error: type[PhimlxError] = ConfigError,
    *,
    hint: str | None = None,
    limit: int = MAX_BYTES,
) -> Any:
    """Read any JSON value; raises `error` as `read_bytes`, and where the file is no JSON."""
    return parse_json(read_bytes(path, error, hint=hint, limit=limit), path, error, hint=hint)


def read_json(
    path: Path,
    error: type[PhimlxError] = ConfigError,
    *,
    hint: str | None = None,
    limit: int = MAX_BYTES,
    missing_ok: bool = False,
) -> dict[str, Any]:
    """Read a JSON object; raises `error` as `read_json_value`, and where it is no object.

    Args:
        missing_ok: whether a file that is not there is an empty object.
    """
    if missing_ok and is_absent(path):
        return {}
    data = read_bytes(path, error, hint=hint, limit=limit)
    return parse_json_object(data, path, error, hint=hint)


def parse_json(
    data: bytes, place: object, error: type[PhimlxError] = ConfigError, *, hint: str | None = None
) -> Any:
    """Parse the JSON value that was read from `place`; raises `error` where it is none."""
    try:
        return json.loads(data.decode("utf-8-sig"), parse_int=read_whole)
    except UnicodeDecodeError as failure:
        raise error(f"{place} is not UTF-8 text.", hint) from failure
    except json.JSONDecodeError as failure:
        where = f"line {failure.lineno}, column {failure.colno}"
        raise error(f"{place} is not JSON ({where}: {failure.msg}).", hint) from failure
    except ValueError as failure:  # a whole number with more digits than Python reads
        raise error(f"{place} holds a number that is too long.", hint) from failure
    except RecursionError as failure:
        raise error(f"{place} is nested too deeply.", hint) from failure


def read_whole(digits: str) -> int | float:
    """Read a whole number of JSON; one beyond every float is an infinity, as 1e400 is.

    Raises:
        ValueError: where it has more digits than Python reads.
    """
    number = int(digits)
    if abs(number) <= _LARGEST:
        return number
    return math.inf if number > 0 else -math.inf


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML that others wrote.

    Raises:
        ValueError: saying in a few words why it is none, or more than settings are.
    """
    import tomllib

    if _MANY_PARTS.search(text):
        raise ValueError("a key has more than 64 parts")
    try:
        return _within_bounds(tomllib.loads(text))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """Parse YAML that others wrote, tags of Python's own apart.

    Raises:
        ValueError: saying in a few words why it is none, or more than settings are.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        table = yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as failure:
        mark = getattr(failure, "problem_mark", None)
        raise ValueError(f"line {mark.line + 1}" if mark else "unreadable") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as failure:
        # What its constructors of dates, numbers and the like raise of other texts.
        raise ValueError(f"a value that is none: {str(failure)[:100]}") from None
    return _within_bounds(table)


def _within_bounds(table: Any) -> Any:
    """Return a parsed value; raises ValueError for long numbers, and for names that multiply it."""
    left, seen = [table], 0
    while left:
        value = left.pop()
        seen += 1
        if seen > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES:,} values")
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value
        elif isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError("a number is too long")
    return table


def json_levels(value: Any) -> Iterator[list[Any]]:
    """The values of each level of objects and lists within each other, but the outermost."""
    level = [value]
    while level := [
        child
        for each in level
        if isinstance(each, dict | list)
        for child in (each.values() if isinstance(each, dict) else each)
    ]:
        yield level


def parse_json_object(
    data: bytes, place: object, error: type[PhimlxError] = ConfigError, *, hint: str | None = None
) -> dict[str, Any]:
    """Parse the JSON object that was read from `place`; raises `error` where it is none."""
    value = parse_json(data, place, error, hint=hint)
    if not isinstance(value, dict):
        raise error(f"{place} is not a JSON object.", hint)
    return value


def is_file(path: Path) -> bool:
    """Whether a regular file is there, links followed; raises OSError where that is not known."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a NUL names nothing
        return False
    except OSError as failure:
        if failure.errno in (errno.ELOOP, errno.ENAMETOOLONG):  # where no file can be
            return False
        raise


def is_absent(path: Path) -> bool:
    """Whether nothing is there, not even a link.

    What may not be looked at is taken to be there: reading it says what is wrong.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, ValueError):  # a NUL names nothing
        return True
    except OSError:
        return False
    return False


@contextmanager
def translate_read_errors(
    place: Path, error: type[PhimlxError], hint: str | None = None
) -> Iterator[None]:
    """Turn OSErrors of the block into `error`: which file or folder of `place` cannot be read."""
    try:
        yield
    except OSError as failure:
        which = clipped(str(failure.filename or place))
        raise error(f"{which} cannot be read: {reason(failure)}.", hint) from failure


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Give a new file beside `path`, to be filled; it becomes `path` when the block ends well.

    It is empty at first and ends as `path` does. Where the block raises, it is removed and what
    stood at `path` stays. What a killed process left of the same kind goes too.

    Args:
        private: whether its owner alone may read it; otherwise the umask decides.

    Raises:
        OSError: where it cannot be written.
    """
    _remove_leftovers(path)
    temporary, descriptor = _create_locked(path, 0o600 if private else 0o666)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    sync(path.parent)


def _create_locked(path: Path, mode: int) -> tuple[Path, int]:
    """Create a temporary file of `path`, locked while this process lives: it is no leftover.

    Between the two, another process may take it for one, and remove it: then there is a new one.
    """
    while True:
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with contextlib.suppress(OSError):  # a file system without locks has no leftovers either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of `path` whose processes are gone, as far as that goes."""
    name = re.compile(rf"\.{re.escape(path.stem)}\.[0-9a-f]{{8}}{re.escape(path.suffix)}")
    with contextlib.suppress(OSError):
        for entry in filter(name.fullmatch, os.listdir(path.parent)):
            descriptor = os.open(path.parent / entry, _NO_LINK)
            try:
                if _lock(descriptor):
                    os.unlink(path.parent / entry)
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file for this process; whether that was possible."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another has it, or the file system has no locks
        return False
    return True


def write_file(path: Path, data: str | bytes, *, private: bool = False) -> None:
    """Replace a file as a whole or not at all; text as UTF-8. Raises OSError."""
    with replacing(path, private=private) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: object, *, private: bool = False) -> None:
    """Replace a file by a JSON value, as a whole or not at all. Raises OSError.

    Raises:
        ValueError: for NaN or an infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=2, allow_nan=False)
    write_file(path, text + "\n", private=private)


def sync(path: Path) -> None:
    """Return when a file, or what a folder lists, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def translate_write_errors(
    place: Path,
    error: type[PhimlxError],
    hint: str | None = None,
    *,
    when_full: str = "Free some space, then try again.",
) -> Iterator[None]:
    """Turn OSErrors of the block into `error`: one sentence and the next step.

    Args:
        place: what a person asked to be written.
        when_full: the hint where the disk has no room.
    """
    try:
        yield
    except OSError as failure:
        if failure.errno in _FULL:
            raise error(f"The disk is full: {place} could not be written.", when_full) from failure
        why = reason(failure)
        if isinstance(failure, FileExistsError | NotADirectoryError):
            why = f"{failure.filename} is not a folder"
        raise error(f"{place} cannot be written: {why}.", hint) from failure


def reason(failure: OSError) -> str:
    """Say why the system refused, as it may end a sentence."""
    return (failure.strerror or str(failure) or type(failure).__name__).lower()
