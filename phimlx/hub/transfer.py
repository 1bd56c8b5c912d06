"""Files from the Hub to a folder: going on where they stopped, checked, and whole or not there.

Knows bytes, hashes and the layout of huggingface_hub's cache; knows nothing of what is in a file.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from phimlx.errors import DownloadError
from phimlx.hub.client import Remote, RemoteFile, Repository, explained
from phimlx.sizes import size_text

PARTIAL = ".phimlx.incomplete"  # huggingface_hub's own cleaning finds *.incomplete
SPARE = 0.05  # of what is to come must stay free beside it
PIECE = 1 << 20  # bytes read at once from disk

WAITING = "Another download of this file is under way; waiting for it."

Report = Callable[[RemoteFile, int], object]
"""Takes a file and how many more of its bytes are known to be right so far (fewer: negative)."""


class Destination(Protocol):
    """Where the files of one repository go."""

    @property
    def root(self) -> Path:
        """What a person knows of the place."""

    @property
    def elsewhere(self) -> str:
        """How a person chooses another one."""

    @property
    def folder(self) -> Path:
        """The folder that holds the files under their names in the end."""

    def content(self, file: RemoteFile) -> Path:
        """Where a whole and checked file lies."""

    def partial(self, file: RemoteFile) -> Path:
        """Where a file grows; the name holds its hash, so another version never goes on with it."""

    def nearby(self, file: RemoteFile) -> Path | None:
        """Another file on this machine that should have the same contents."""

    def lock(self, file: RemoteFile) -> Path:
        """What two downloads of the same file agree on."""

    def place(self, file: RemoteFile) -> None:
        """Give a whole file its name in the folder."""

    def finish(self, files: tuple[RemoteFile, ...]) -> None:
        """Record that everything is here."""


@dataclass(frozen=True)
class HubCache:
    """A model's place in huggingface_hub's cache, where other tools find it too.

    blobs/<hash> holds contents, snapshots/<commit>/<name> points to them, refs/<revision> names
    the commit.
    Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """

    root: Path
    repository: Repository
    elsewhere: str = "set HF_HOME to"

    @property
    def home(self) -> Path:
        return self.root / f"models--{self.repository.name.replace('/', '--')}"

    @property
    def folder(self) -> Path:
        return self.home / "snapshots" / self.repository.commit

    def content(self, file: RemoteFile) -> Path:
        return self.home / "blobs" / file.hash

    def partial(self, file: RemoteFile) -> Path:
        return self.home / "blobs" / (file.hash + PARTIAL)

    def nearby(self, file: RemoteFile) -> Path | None:
        return None

    def lock(self, file: RemoteFile) -> Path:
        return self.root / ".locks" / self.home.name / f"{file.hash}.lock"

    def place(self, file: RemoteFile) -> None:
        pointer = self.folder / file.name
        target = os.path.relpath(self.content(file), pointer.parent)
        if pointer.is_symlink() and os.readlink(pointer) == target:
            return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        new = pointer.with_name(f".{pointer.name}.{os.getpid()}")
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        os.replace(new, pointer)

    def finish(self, files: tuple[RemoteFile, ...]) -> None:
        if self.repository.revision != self.repository.commit:
            _write(self.home / "refs" / self.repository.revision, self.repository.commit)


@dataclass(frozen=True)
class PlainFolder:
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
        return self.folder / ".cache" / "phimlx"

    def content(self, file: RemoteFile) -> Path:
        return self.folder / file.name

    def partial(self, file: RemoteFile) -> Path:
        return self.own / (file.hash + PARTIAL)

    def nearby(self, file: RemoteFile) -> Path | None:
        blobs = self.cache.glob(f"models--*/blobs/{file.hash}") if self.cache else ()
        sized = (blob for blob in blobs if blob.is_file() and blob.stat().st_size == file.size)
        return next(sized, None)

    def lock(self, file: RemoteFile) -> Path:
        return self.own / f"{file.hash}.lock"

    def place(self, file: RemoteFile) -> None:
        """It has its name already."""

    def finish(self, files: tuple[RemoteFile, ...]) -> None:
        record = {
            "repository": self.repository.current_name,
            "revision": self.repository.revision,
            "commit": self.repository.commit,
            "files": {file.name: {"size": file.size, "hash": file.hash} for file in files},
        }
        _write(record_of(self.folder), json.dumps(record, indent=2) + "\n")


def record_of(folder: Path) -> Path:
    """The file that says what a plain folder should hold."""
    return folder / ".cache" / "phimlx" / "download.json"


@dataclass(frozen=True)
class Plan:
    """A download that has been thought through and not begun.

    Attributes:
        files: what is to be there in the end, the small ones first.
    """

    repository: Repository
    destination: Destination
    files: tuple[RemoteFile, ...]

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    @property
    def remaining(self) -> int:
        """Bytes that are still to come, if what is here proves right."""
        return sum(file.size - self._held(file) for file in self.files)

    @property
    def nearby(self) -> int:
        """Bytes of these that another place on this machine has, from where they are copied."""
        missing = [file for file in self.files if self._held(file) < file.size]
        return sum(file.size for file in missing if self.destination.nearby(file))

    def _held(self, file: RemoteFile) -> int:
        content, partial = self.destination.content(file), self.destination.partial(file)
        if content.is_file() and content.stat().st_size == file.size:
            return file.size
        return min(partial.stat().st_size, file.size) if partial.is_file() else 0

    def check_space(self) -> None:
        """Raise DownloadError, with the numbers, where the disk has no room for the rest."""
        remaining = self.remaining
        needed = int(remaining * (1 + SPARE))
        free = free_space(self.destination.root)
        if remaining and needed > free:
            raise DownloadError(
                f"{self.repository.name} needs {size_text(needed)} of disk space "
                f"({size_text(remaining)} to come and {SPARE:.0%} to spare), but "
                f"{self.destination.root} has {size_text(free)}.",
                hint=f"Free some space, or {self.destination.elsewhere} a folder on a larger disk.",
            )

    def run(self, remote: Remote, report: Report = lambda file, nbytes: None) -> Path:
        """Bring what is missing and check what is here, file by file; returns the folder.

        However it is stopped, what has come stays, and the next run goes on from there.

        Raises:
            DownloadError: network, permission, disk, or contents that are not what they should be.
        """
        where = self.destination
        with explained(self.repository.name, self.repository.revision, where.root, where.elsewhere):
            for file in self.files:
                with locked(where.lock(file), lambda: remote.tell(WAITING)):
                    fetch(remote, self.repository, file, where, report)
                    where.place(file)
            where.finish(self.files)
        return where.folder


def fetch(
    remote: Remote,
    repository: Repository,
    file: RemoteFile,
    destination: Destination,
    report: Report,
) -> None:
    """Have one file whole: check it where it is here, else copy or bring it, twice if it is wrong.

    Raises:
        DownloadError: where it came wrong twice.
    """
    content, partial = destination.content(file), destination.partial(file)
    if content.is_file():
        if content.stat().st_size == file.size and is_right(content, file, report):
            return
        content.unlink()
    elif content.is_symlink():
        content.unlink()  # it points nowhere
    content.parent.mkdir(parents=True, exist_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    copy = destination.nearby(file)
    if copy is not None and is_right(copy, file, report):
        duplicate(copy, partial)
        os.replace(partial, content)
        return
    for _ in range(2):
        if _receive(remote, repository, file, partial, report):
            os.replace(partial, content)
            return
        partial.unlink()
    raise DownloadError(
        f"{file.name} of {repository.name} came twice with contents that are not what the Hub "
        "says they are; they are deleted.",
        hint="Try again later, or from another network: something on the way changes them.",
    )


def is_right(path: Path, file: RemoteFile, report: Report) -> bool:
    """Whether a file here has the contents that it should have; takes back its report if not."""
    with path.open("rb") as opened:
        digest, seen = file.hasher(), 0
        while piece := opened.read(PIECE):
            digest.update(piece)
            seen += len(piece)
            report(file, len(piece))
    if digest.hexdigest() == file.hash:
        return True
    report(file, -seen)
    return False


def duplicate(source: Path, target: Path) -> None:
    """Copy a file, where the disk is APFS without taking space.

    No hard link: whoever changed the one file would change the other.
    """
    target.unlink(missing_ok=True)
    if sys.platform == "darwin":
        clone = ctypes.CDLL(None).clonefile
        if clone(os.fsencode(os.path.realpath(source)), os.fsencode(target), 0) == 0:
            return
    shutil.copyfile(source, target)


def _receive(
    remote: Remote, repository: Repository, file: RemoteFile, partial: Path, report: Report
) -> bool:
    """Let a file grow to its size, however often the connection ends; whether it is right then."""
    from huggingface_hub import errors

    with _Growing(partial, file, report) as growing:
        failures, furthest = 0, growing.size
        while growing.size < file.size:
            lost: Exception | None = None
            try:
                with remote.open(repository, file, growing.size) as (begin, pieces):
                    if begin != growing.size:
                        growing.start_over()
                    if begin == growing.size:
                        for piece in pieces:
                            growing.add(piece)
                            if growing.size > file.size:
                                break
            except errors.HTTPError as error:  # type: ignore[attr-defined]
                lost = error
            failures = 1 if growing.size > furthest else failures + 1
            furthest = max(furthest, growing.size)
            if growing.size < file.size:
                remote.pause(lost or _ended(repository, file, growing.size), failures)
        return growing.finish()


def _ended(repository: Repository, file: RemoteFile, size: int) -> DownloadError:
    return DownloadError(
        f"{file.name} of {repository.name} ends after {size:,} of {file.size:,} bytes.",
        hint="Run it again in a few minutes; what has come stays.",
    )


class _Growing:
    """A file that is not whole yet, with the hash of what it holds."""

    def __init__(self, path: Path, file: RemoteFile, report: Report) -> None:
        self.path, self.file, self.report = path, file, report
        self.size = 0

    def __enter__(self) -> _Growing:
        # A link in its place could lead the bytes anywhere.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self.opened = os.fdopen(os.open(self.path, flags, 0o666), "r+b")
        self.digest = self.file.hasher()
        if os.fstat(self.opened.fileno()).st_size > self.file.size:
            self.opened.truncate(0)
        while piece := self.opened.read(PIECE):
            self._count(piece)
        self.opened.seek(self.size)
        return self

    def __exit__(self, *exception: object) -> None:
        self.opened.close()

    def add(self, piece: bytes) -> None:
        """Append what has come, so that it is there even if the process is killed now."""
        self.opened.write(piece)
        self.opened.flush()
        self._count(piece)

    def start_over(self) -> None:
        """Forget everything."""
        self.opened.seek(0)
        self.opened.truncate()
        self.report(self.file, -self.size)
        self.size, self.digest = 0, self.file.hasher()

    def finish(self) -> bool:
        """Make it durable where it is right; take back the report where it is not."""
        if self.size == self.file.size and self.digest.hexdigest() == self.file.hash:
            os.fsync(self.opened.fileno())
            return True
        self.report(self.file, -self.size)
        return False

    def _count(self, piece: bytes) -> None:
        self.digest.update(piece)
        self.size += len(piece)
        self.report(self.file, len(piece))


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock that huggingface_hub's own downloads respect; it ends with the process."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(path, timeout=0.1))
        except TimeoutError:
            on_wait()
            held.enter_context(WeakFileLock(path))
        yield


def free_space(folder: Path) -> int:
    """Bytes free on the disk where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _write(path: Path, text: str) -> None:
    """Put a small file in its place whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text)
    os.replace(new, path)
