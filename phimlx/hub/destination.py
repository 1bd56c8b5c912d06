"""The places that a repository's files go to: huggingface_hub's cache, or a folder of one's own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from phimlx.errors import DownloadError
from phimlx.files import read_json, write_file, write_json
from phimlx.hub import layout
from phimlx.hub.client import RemoteFile, Repository

PARTIAL = ".phimlx.incomplete"  # huggingface_hub's own cleaning finds *.incomplete

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


class Destination(Protocol):
    """A place that the files of one repository go to."""

    @property
    def root(self) -> Path:
        """The folder that a person knows the place by."""

    @property
    def elsewhere(self) -> str:
        """The words that say how a person chooses another one."""

    @property
    def folder(self) -> Path:
        """The folder that holds the files under their names in the end."""

    def content(self, file: RemoteFile) -> Path:
        """The path of a whole and checked file."""

    def partial(self, file: RemoteFile) -> Path:
        """The path of a file that grows; its hash is in it, so no other version goes on with it."""

    def copy_source(self, file: RemoteFile) -> Path | None:
        """Another file on this machine that should have the same contents."""

    def lock(self, file: RemoteFile) -> Path:
        """The lock that two downloads of the same file agree on."""

    def place(self, file: RemoteFile) -> None:
        """Give a whole file its name in the folder."""

    def finish(self, files: tuple[RemoteFile, ...]) -> None:
        """Record that everything is here."""


@dataclass(frozen=True)
class CacheDestination:
    """A repository's place in huggingface_hub's cache, where other tools find it too."""

    root: Path
    repository: Repository
    elsewhere: str = "set HF_HOME to"

    @property
    def home(self) -> layout.RepositoryFolder:
        """All of the repository."""
        return layout.RepositoryFolder(self.root, self.repository.name, self.repository.type)

    @property
    def folder(self) -> Path:
        return self.home.snapshot(self.repository.commit)

    def content(self, file: RemoteFile) -> Path:
        return self.home.blob(file.hash)

    def partial(self, file: RemoteFile) -> Path:
        return self.home.blob(file.hash + PARTIAL)

    def copy_source(self, file: RemoteFile) -> Path | None:
        return None

    def lock(self, file: RemoteFile) -> Path:
        return self.home.lock(file.hash)

    def place(self, file: RemoteFile) -> None:
        pointer = self.folder / file.name
        target = os.path.relpath(self.content(file), pointer.parent)
        if pointer.is_symlink() and os.readlink(pointer) == target:
            return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        new = pointer.with_name(f".{pointer.name}.phimlx")  # the lock of the file holds it too
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        os.replace(new, pointer)

    def finish(self, files: tuple[RemoteFile, ...]) -> None:
        if self.repository.revision != self.repository.commit:
            ref = self.home.ref(self.repository.revision)
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_file(ref, self.repository.commit)


@dataclass(frozen=True)
class FolderDestination:
    """A folder of the user's own, with plain files; what is ours lies in its .cache/phimlx.

    Attributes:
        cache: huggingface_hub's, where a file may lie already.
    """

    folder: Path
    repository: Repository
    elsewhere: str = "choose with --local-dir"
    cache: Path | None = None

    @property
    def root(self) -> Path:
        return self.folder

    @property
    def own(self) -> Path:
        """The folder of what is no file of the repository."""
        return record_path(self.folder).parent

    def content(self, file: RemoteFile) -> Path:
        return self.folder / file.name

    def partial(self, file: RemoteFile) -> Path:
        return self.own / (file.hash + PARTIAL)

    def copy_source(self, file: RemoteFile) -> Path | None:
        return layout.find_blob(self.cache, file.hash, file.size) if self.cache else None

    def lock(self, file: RemoteFile) -> Path:
        return self.own / f"{file.hash}.lock"

    def place(self, file: RemoteFile) -> None:
        """It has its name already."""

    def finish(self, files: tuple[RemoteFile, ...]) -> None:
        self.own.mkdir(parents=True, exist_ok=True)
        record = {
            "repository": self.repository.current_name,
            "revision": self.repository.revision,
            "commit": self.repository.commit,
            "files": {file.name: {"size": file.size, "hash": file.hash} for file in files},
        }
        write_json(record_path(self.folder), record)


@dataclass(frozen=True)
class DownloadRecord:
    """The files that a folder of the user's own should hold, as its download noted them.

    Attributes:
        files: by name.
    """

    repository: str
    commit: str
    files: Mapping[str, RemoteFile]


def record_path(folder: Path) -> Path:
    """The file that says what a folder of the user's own should hold."""
    return folder / ".cache" / "phimlx" / "download.json"


def read_record(folder: Path) -> DownloadRecord | None:
    """Read what a download noted of a folder; None where none did.

    Raises:
        DownloadError: where the note is damaged.
    """
    path = record_path(folder)
    hint = "Download the model again; what is right stays as it is."
    record = read_json(path, DownloadError, hint=hint, missing_ok=True)
    if not record:
        return None
    try:
        return DownloadRecord(
            _text(record["repository"], _NAME),
            _text(record["commit"], layout.COMMIT),
            {name: _recorded_file(name, entry) for name, entry in record["files"].items()},
        )
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DownloadError(f"{path} is damaged: it is no record of a download.", hint) from error


def origin_of(folder: Path) -> tuple[str, str] | None:
    """The repository and commit that a folder came from; None where nothing tells.

    Its place in huggingface_hub's cache tells, or the record of its download.

    Raises:
        DownloadError: where that record is damaged.
    """
    place = layout.place_of(folder)
    if place is not None:
        return place if layout.COMMIT.fullmatch(place[1]) else None
    record = read_record(folder)
    return None if record is None else (record.repository, record.commit)


def _recorded_file(name: str, entry: Any) -> RemoteFile:
    return RemoteFile(name, int(entry["size"]), _text(entry["hash"], layout.CONTENT_HASH))


def _text(value: Any, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(value):
        raise ValueError(value)
    return str(value)
