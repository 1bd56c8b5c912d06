"""Files from the Hub to a folder: going on where they stopped, checked, and whole or not there.

`scripts/faults.py` holds this beside huggingface_hub 2.4: `hf_hub_download` of each file, and then
`verify_repo_checksums`. Through 36 faults that pair lacks four things, and this module is them:

- It begins again at the first byte, and deletes what has come when it gives up. A connection cut at
  7/8 fetches 88 % twice, a process killed half-way 50 %; 20 cuts end in an error, and it takes 4
  runs and 95 % twice to come through. Here nothing is fetched twice in any of these.
- It compares hashes in a second pass over all files, and only against the Hub. Here they are
  computed while bytes come, so that a wrong file never gets its name.
- An answer of another length, one byte too many or 1000 too few, ends in an error for good; here it
  is fetched again, or the rest of it.
- It says none of that in a sentence, neither a file that would leave the folder.

In one row that pair does better: where a server answers with another range than was asked for, ours
begins again at the first byte and waits 3 s, theirs fetches half again after 1 s.

Xet's servers cannot be had in that table. Its transfer writes to the same temporary file, which the
library deletes after every failure, so it cannot go on either.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from phimlx.errors import DownloadError
from phimlx.files import is_file
from phimlx.hub.client import Remote, RemoteFile, Repository, translate_errors
from phimlx.hub.destination import Destination
from phimlx.sizes import size_text

SPARE = 0.05  # of what is to come must stay free beside it
CHUNK = 1 << 20  # bytes read at once from disk

WAITING = "Another download of this file is under way; waiting for it."

ProgressCallback = Callable[[RemoteFile, int], object]
"""Takes a file and how many more of its bytes are known to be right so far (fewer: negative)."""


def no_progress(file: RemoteFile, nbytes: int) -> None:
    """Let bytes come without looking: a `ProgressCallback`."""


@dataclass(frozen=True)
class DownloadPlan:
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
        """Bytes that are still to come, if what is here proves right.

        Raises:
            DownloadError: where what is here cannot be read.
        """
        with self._translated():
            return sum(file.size - self._held(file) for file in self.files)

    @property
    def copied(self) -> int:
        """Bytes of these that another place on this machine has, from where they are copied."""
        with self._translated():
            missing = [file for file in self.files if self._held(file) < file.size]
            return sum(file.size for file in missing if self.destination.copy_source(file))

    def _held(self, file: RemoteFile) -> int:
        content, partial = self.destination.content(file), self.destination.partial(file)
        if is_file(content) and content.stat().st_size == file.size:
            return file.size
        return min(partial.stat().st_size, file.size) if is_file(partial) else 0

    def _translated(self) -> AbstractContextManager[None]:
        repository, where = self.repository, self.destination
        return translate_errors(
            repository.name, repository.revision, where.root, where.elsewhere, repository.type
        )

    def check_space(self) -> None:
        """Raise DownloadError, with the numbers, where the disk has no room for the rest."""
        remaining = self.remaining
        needed = int(remaining * (1 + SPARE))
        with self._translated():
            free = free_space(self.destination.root)
        if remaining and needed > free:
            raise DownloadError(
                f"{self.repository.name} needs {size_text(needed)} of disk space "
                f"({size_text(remaining)} to come and {SPARE:.0%} to spare), but "
                f"{self.destination.root} has {size_text(free)}.",
                hint=f"Free some space, or {self.destination.elsewhere} a folder on a larger disk.",
            )

    def run(self, remote: Remote, progress: ProgressCallback = no_progress) -> Path:
        """Download what is missing and check what is here, file by file; returns the folder.

        However it is stopped, what has come stays, and the next run goes on from there.

        Raises:
            DownloadError: network, permission, disk, or contents that are not what they should be.
        """
        where = self.destination
        with self._translated():
            for file in self.files:
                with locked(where.lock(file), lambda: remote.log(WAITING)):
                    fetch(remote, self.repository, file, where, progress)
                    where.place(file)
            where.finish(self.files)
        return where.folder


def fetch(
    remote: Remote,
    repository: Repository,
    file: RemoteFile,
    destination: Destination,
    progress: ProgressCallback,
) -> None:
    """Make one file whole: check it where it is here, else copy or download it, at most twice.

    Raises:
        DownloadError: where it came wrong twice.
    """
    content, partial = destination.content(file), destination.partial(file)
    if is_file(content):
        if content.stat().st_size == file.size and matches_hash(content, file, progress):
            return
        content.unlink()
    elif content.is_symlink():
        content.unlink()  # it points nowhere
    content.parent.mkdir(parents=True, exist_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    copy = destination.copy_source(file)
    if copy is not None and matches_hash(copy, file, progress):
        duplicate(copy, partial)
        os.replace(partial, content)
        return
    for _ in range(2):
        if _receive(remote, repository, file, partial, progress):
            os.replace(partial, content)
            return
        partial.unlink()
    raise DownloadError(
        f"{file.name} of {repository.name} came twice with contents that are not what the Hub "
        "says they are; they are deleted.",
        hint="Try again later, or from another network: something on the way changes them.",
    )


def matches_hash(path: Path, file: RemoteFile, progress: ProgressCallback = no_progress) -> bool:
    """Whether a file here has the contents that it should; takes back its progress if not."""
    with path.open("rb") as opened:
        digest, seen = file.hasher(), 0
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
            seen += len(chunk)
            progress(file, len(chunk))
    if digest.hexdigest() == file.hash:
        return True
    progress(file, -seen)
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
    remote: Remote,
    repository: Repository,
    file: RemoteFile,
    partial: Path,
    progress: ProgressCallback,
) -> bool:
    """Let a file grow to its size, however often the connection ends; whether it is right then."""
    from huggingface_hub import errors

    with _PartialFile(partial, file, progress) as partial_file:
        failures, furthest = 0, partial_file.size
        while partial_file.size < file.size:
            lost: Exception | None = None
            try:
                with remote.open(repository, file, partial_file.size) as (begin, chunks):
                    if begin != partial_file.size:
                        partial_file.start_over()
                    if begin == partial_file.size:
                        for chunk in chunks:
                            partial_file.append(chunk)
                            if partial_file.size > file.size:
                                break
            except errors.HTTPError as error:  # type: ignore[attr-defined]
                lost = error
            failures = 1 if partial_file.size > furthest else failures + 1
            furthest = max(furthest, partial_file.size)
            if partial_file.size < file.size:
                remote.pause(lost or _ended(repository, file, partial_file.size), failures)
        return partial_file.finish()


def _ended(repository: Repository, file: RemoteFile, size: int) -> DownloadError:
    return DownloadError(
        f"{file.name} of {repository.name} ends after {size:,} of {file.size:,} bytes.",
        hint="Run it again in a few minutes; what has come stays.",
    )


class _PartialFile:
    """A file that is not whole yet, with the hash of what it holds."""

    def __init__(self, path: Path, file: RemoteFile, progress: ProgressCallback) -> None:
        self.path, self.file, self.progress = path, file, progress
        self.size = 0

    def __enter__(self) -> _PartialFile:
        self.opened = open(self.path, "r+b", opener=_without_links)
        try:
            self.digest = self.file.hasher()
            if os.fstat(self.opened.fileno()).st_size > self.file.size:
                self.opened.truncate(0)
            while chunk := self.opened.read(CHUNK):
                self._count(chunk)
            self.opened.seek(self.size)
        except BaseException:
            self.opened.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.opened.close()

    def append(self, chunk: bytes) -> None:
        """Add what has come, so that it is there even if the process is killed now."""
        self.opened.write(chunk)
        self.opened.flush()
        self._count(chunk)

    def start_over(self) -> None:
        """Forget everything."""
        self.opened.seek(0)
        self.opened.truncate()
        self.progress(self.file, -self.size)
        self.size, self.digest = 0, self.file.hasher()

    def finish(self) -> bool:
        """Make it durable where it is right; take back its progress where it is not."""
        if self.size == self.file.size and self.digest.hexdigest() == self.file.hash:
            os.fsync(self.opened.fileno())
            return True
        self.progress(self.file, -self.size)
        return False

    def _count(self, chunk: bytes) -> None:
        self.digest.update(chunk)
        self.size += len(chunk)
        self.progress(self.file, len(chunk))


def _without_links(path: str, flags: int) -> int:
    """Open a file, making it where it is not there; a link could lead the bytes anywhere."""
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)


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
