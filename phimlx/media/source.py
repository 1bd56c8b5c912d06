"""The bytes of a file on disk, behind an https URL, or already in memory."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from phimlx.errors import MediaError
from phimlx.media.limits import Limits, check_size, source_name

BytesLike = bytes | bytearray | memoryview
FileSource = str | Path | BytesLike | BinaryIO

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def is_url(source: object) -> bool:
    """Tell whether a source names a place on a network, of whatever scheme."""
    return isinstance(source, str) and _SCHEME.match(source) is not None


def read_bytes(source: FileSource, limits: Limits | None = None) -> bytes:
    """Read all bytes of a path, an https URL, a file object open for reading bytes, or bytes.

    Raises:
        MediaError: nothing is there, it is no regular file, it cannot be read, it is empty, it
            is larger than the limits allow, or the URL is one that is not followed.
    """
    limits = limits or Limits()
    if isinstance(source, bytes | bytearray | memoryview):
        data = source if isinstance(source, bytes) else bytes(source)
        check_size(source, len(data), limits.max_bytes)
    elif isinstance(source, str) and is_url(source):
        from phimlx.media.fetch import fetch

        data = fetch(source, limits)
    elif isinstance(source, str | Path):
        data = _read_file(source, limits)
    else:
        data = _read_opened(source, limits)
    if not data:
        raise MediaError(f"{source_name(source)} is empty.")
    return data


def _read_opened(source: object, limits: Limits) -> bytes:
    read = getattr(source, "read", None)
    data = read(limits.max_bytes + 1) if callable(read) else source
    if not isinstance(data, bytes):
        what = (
            "file opened as text"
            if isinstance(data, str)
            else f"value of type {type(source).__name__}"
        )
        raise MediaError(
            f"A {what} is nothing to read bytes from.",
            hint="Give a path, an https URL, bytes, or a file opened for reading bytes.",
        )
    check_size(source, len(data), limits.max_bytes)
    return data


def _read_file(path: str | Path, limits: Limits) -> bytes:
    name = source_name(path)
    try:
        # A pipe or a device opens without waiting, and is then refused.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise MediaError(f"{name} is {what}.", hint="Name a file.")
            check_size(path, status.st_size, limits.max_bytes)
            return file.read()
    except FileNotFoundError as error:
        raise MediaError(f"There is no file {name}.", hint="Check the path.") from error
    except IsADirectoryError as error:
        raise MediaError(f"{name} is a folder.", hint="Name a file.") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or "its name holds a null byte"
        raise MediaError(f"{name} cannot be read: {reason}.") from error
