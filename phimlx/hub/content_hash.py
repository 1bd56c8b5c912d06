"""SHA-256 of files that are too large to read at every start: told by the Hub, or computed once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from phimlx.errors import CacheError, ConfigError
from phimlx.files import read_json, write_json
from phimlx.folders import cache_folder
from phimlx.hub.layout import recorded_hash

KEPT = 1000  # hashes of the files that were asked for last
WEIGHTS = (".json", ".safetensors", ".gguf")  # and what says how they are used
SETTLED = 2.0  # seconds after which another change shows in a file's time, on every file system


def cache_file() -> Path:
    """The file that keeps hashes that were computed."""
    return cache_folder() / "hashes.json"


def content_hash(file: Path) -> str:
    """Compute the SHA-256 of a file's contents, or take it from where it is known.

    The Hub's cache names the contents of large files by it. What was computed is kept, and counts
    while path, device, inode, size and both times of the file are the same; a cache that cannot be
    read or written only costs the time to compute again.

    Raises:
        OSError: where the file cannot be read.
    """
    recorded = recorded_hash(file)
    if recorded is not None and len(recorded) == 64:
        return recorded
    known = _known()
    before = _identity(file)
    if before in known:
        return known[before]
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    changed = max(os.stat(file).st_mtime, os.stat(file).st_ctime)
    if _identity(file) == before and time.time() - changed > SETTLED:
        with contextlib.suppress(OSError):
            cache_file().parent.mkdir(parents=True, exist_ok=True)
            write_json(cache_file(), dict(list(_known().items())[1 - KEPT :]) | {before: found})
    return found


class Contents:
    """Files as they are before a model is loaded from them, and what tells their contents."""

    def __init__(self, folder: Path, files: Iterable[Path] = ()) -> None:
        """Look at what a folder has of JSON and weights, and at further files below it."""
        beside = (file for file in folder.iterdir() if file.suffix in WEIGHTS)
        found = {file for file in (*beside, *files) if file.is_file()}
        self._files = {str(file.relative_to(folder)): file for file in sorted(found)}
        self._before = self._identities()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names and contents; what has to be read is read at most once.

        Raises:
            CacheError: where a file has changed since.
            OSError: where it cannot be read.
        """
        lines = [f"{content_hash(file)} {name}" for name, file in self._files.items()]
        if self._identities() != self._before:
            raise CacheError("The model's files have changed since it was loaded.")
        return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()

    @property
    def stamp(self) -> str:
        """What tells the files from any others as they were then, without reading them."""
        text = "\n".join(self._before)
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()

    def _identities(self) -> list[str]:
        return [_identity(file) for file in self._files.values()]


def _identity(file: Path) -> str:
    stat = os.stat(file)
    numbers = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return f"{file.resolve()} {' '.join(map(str, numbers))}"


def _known() -> dict[str, str]:
    try:
        return read_json(cache_file(), missing_ok=True)
    except ConfigError:
        return {}
