"""SHA-256 of files that are too large to read at every start: told by the Hub, or computed once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

from phimlx.errors import ConfigError
from phimlx.files import read_json, write_json
from phimlx.hub.layout import recorded_hash

KEPT = 1000  # hashes of the files that were asked for last
SETTLED = 2.0  # seconds after which another change shows in a file's time, on every file system


def cache_file() -> Path:
    """The file that keeps hashes that were computed."""
    import platformdirs

    return platformdirs.user_cache_path("phimlx", appauthor=False) / "hashes.json"


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


def _identity(file: Path) -> str:
    stat = os.stat(file)
    numbers = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return f"{file.resolve()} {' '.join(map(str, numbers))}"


def _known() -> dict[str, str]:
    try:
        return read_json(cache_file(), missing_ok=True)
    except ConfigError:
        return {}
