"""huggingface_hub's cache on disk: the one place that knows how its folders are laid out.

```
models--owner--name/             one repository; datasets--owner--name for a data set
    blobs/<hash>                 contents
    snapshots/<commit>/<name>    links to them
    refs/<revision>              the commit that a branch or tag meant when it was last asked for
.locks/models--owner--name/<hash>.lock
```

Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Literal

RepositoryType = Literal["model", "dataset"]

VARIABLE = "HF_HUB_CACHE"  # which huggingface_hub reads when it is imported

CONTENT_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}")

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_MODELS = "models--"
_SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class RepositoryFolder:
    """One repository's place in a cache, whether or not anything is there.

    Attributes:
        root: the cache.
        name: `owner/name`.
    """

    root: Path
    name: str
    type: RepositoryType = "model"

    @property
    def path(self) -> Path:
        """The folder with all of it."""
        return self.root / f"{self.type}s--{self.name.replace('/', '--')}"

    @property
    def locks(self) -> Path:
        """The folder of its locks."""
        return self.root / ".locks" / self.path.name

    @property
    def snapshots(self) -> Path:
        """The folder of its snapshots."""
        return self.path / _SNAPSHOTS

    @property
    def blobs(self) -> Path:
        """The folder of contents."""
        return self.path / "blobs"

    def snapshot(self, commit: str) -> Path:
        """The folder that looks like the repository at a commit."""
        return self.snapshots / commit

    def blob(self, hash: str) -> Path:
        """The file with contents of that hash."""
        return self.blobs / hash

    def ref(self, revision: str) -> Path:
        """The file that notes which commit a branch or tag meant."""
        return self.path / "refs" / revision

    def lock(self, hash: str) -> Path:
        """The lock that two downloads of the same contents agree on."""
        return self.locks / f"{hash}.lock"

    def noted_commit(self, revision: str) -> str | None:
        """The commit that a branch or tag meant when it was last asked for, or None.

        Raises:
            OSError: where that cannot be read.
        """
        try:
            return self.ref(revision).read_text().strip()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def list_snapshots(self) -> list[Path]:
        """List the snapshots that are here, the newest last; links that lead nowhere do not count.

        Raises:
            OSError: where they cannot be read.
        """
        found = [(stat.st_mtime_ns, path) for path, stat in _scan(self.snapshots)]
        return [path for _, path in sorted(found)]

    def contents(self) -> Iterator[os.stat_result]:
        """Look at the files that hold contents: blobs, and in snapshots what is no link to one.

        Raises:
            OSError: where they cannot be read.
        """
        yield from (stat for _, stat in _scan(self.blobs) if S_ISREG(stat.st_mode))
        for folder, _, names in os.walk(self.snapshots, onerror=_raise_unless_absent):
            stats = (os.lstat(os.path.join(folder, name)) for name in names)
            yield from (stat for stat in stats if S_ISREG(stat.st_mode))

    def has_blob_like(self, suffix: str) -> bool:
        """Whether contents are here, perhaps not whole, whose name ends so."""
        return any(path.name.endswith(suffix) for path, _ in _scan(self.blobs))


def cache_folder() -> Path:
    """huggingface_hub's cache, as the environment names it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def model_folders(root: Path) -> list[RepositoryFolder]:
    """Every model's place in a cache, by name.

    Raises:
        OSError: where the cache is there and cannot be read.
    """
    names = sorted(path.name for path, _ in _scan(root))
    homes = (name for name in names if name.startswith(_MODELS))
    found = (name.removeprefix(_MODELS).replace("--", "/", 1) for name in homes)
    return [RepositoryFolder(root, name) for name in found if "/" in name]


def place_of(snapshot: Path) -> tuple[str, str] | None:
    """The repository and the commit that a folder stands for in a cache; None for any other."""
    home = snapshot.parent.parent.name
    if snapshot.parent.name != _SNAPSHOTS or not home.startswith(_MODELS):
        return None
    name = home.removeprefix(_MODELS).replace("--", "/", 1)
    return (name, snapshot.name) if _NAME.fullmatch(name) else None


def model_name(folder: Path) -> str:
    """Name a model by its folder: the repository that has it in a cache, else the folder's name."""
    place = place_of(folder)
    return folder.name if place is None else place[0]


def home_of(folder: Path) -> Path:
    """The folder that all files of a model's folder lie in, after links of a cache are followed."""
    return folder.parent.parent if folder.parent.name == _SNAPSHOTS else folder


def recorded_hash(file: Path) -> str | None:
    """The hash that a snapshot's file, a link to a blob, should have; None for any other file."""
    blob = Path(os.readlink(file)) if file.is_symlink() else file
    named = blob.parent.name == "blobs" and CONTENT_HASH.fullmatch(blob.name)
    return blob.name if named else None


def find_blob(root: Path, hash: str, size: int) -> Path | None:
    """Contents of that hash and size that some model in a cache has, where they can be read."""
    blobs = (blob for blob in root.glob(f"{_MODELS}*/blobs/{hash}") if os.access(blob, os.R_OK))
    return next((blob for blob in blobs if blob.is_file() and blob.stat().st_size == size), None)


def _scan(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Look at what a folder holds, links followed; nothing where it is not there."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        try:
            yield Path(entry.path), entry.stat()
        except FileNotFoundError:
            continue  # a link that leads nowhere


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
