"""A model on the Hub, as a folder that its weight files come to one at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from convert.folder import claim, discard, refuse_existing, source_folder, writing
from convert.read import WeightFiles
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.head import has_own_head
from phimlx.checkpoint.tensors import StoredRows
from phimlx.errors import CheckpointError, DownloadError
from phimlx.hub import download, resolve
from phimlx.hub.client import Remote, RemoteFile, Repository
from phimlx.hub.destination import FolderDestination
from phimlx.hub.layout import RepositoryFolder
from phimlx.hub.transfer import DownloadPlan

MAX_HEADER_BYTES = 100_000_000  # as safetensors' own parser
ELSEWHERE = "choose for the output"  # what a message about a full disk says


class StoppedError(Exception):
    """A transfer that nobody waits for any more."""


@dataclass
class StreamedModel(WeightFiles):
    """Weight files of a repository: each comes when it is first read, and goes after the last time.

    Attributes:
        folder: looks like the whole model. Its small files are whole; its weight files are their
            headers and a hole of the right size, enough to lay a conversion out.
        shards: what will come.
        report: called with the bytes of weights that come.
    """

    repository: Repository
    remote: Remote
    home: Path
    shards: tuple[RemoteFile, ...]
    report: Callable[[int], object] = lambda nbytes: None
    stopped: threading.Event = field(default_factory=threading.Event)

    keep_after = (DownloadError, KeyboardInterrupt)

    @property
    def folder(self) -> Path:
        """Named as in huggingface_hub's cache, so that name and revision can be told from it."""
        return RepositoryFolder(self.home, self.repository.name).snapshot(self.repository.commit)

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.shards)

    def spare(self, order: Sequence[frozenset[Path]]) -> int:
        """Bytes of those that lie on the disk at once: each from its first tensor to its last."""
        ends = {file: number for number, files in enumerate(order) for file in files}
        sizes = {self.folder / shard.name: shard.size for shard in self.shards}
        here: set[Path] = set()
        most = 0
        for number, files in enumerate(order):
            here |= files
            most = max(most, sum(sizes[file] for file in here))
            here = {file for file in here if ends[file] > number}
        return most

    def open(self, file: Path) -> int:
        """Bring a file, checked against its hash, and open it."""
        name = self._name(file)
        shard = next(shard for shard in self.shards if shard.name == name)
        self._transfer(shard, self._coming)
        arrived = self._coming / shard.name
        with file.open("rb") as known, arrived.open("rb") as opened:
            length = 8 + int.from_bytes(known.read(8), "little")
            known.seek(0)
            if known.read(length) != opened.read(length):
                raise CheckpointError(
                    f"{shard.name} does not begin as the Hub said it does.",
                    hint="Try again later, or from another network.",
                )
        return os.open(arrived, os.O_RDONLY)

    def close(self, file: Path, descriptor: int) -> None:
        """Close a file and remove it."""
        os.close(descriptor)
        (self._coming / self._name(file)).unlink()

    def stop(self) -> None:
        """Let a transfer that is under way end."""
        self.stopped.set()

    def prepare(self, small: tuple[RemoteFile, ...]) -> None:
        """Bring the small files, the headers, and what tells whether a tied head is another."""
        for file in small:
            self._transfer(file, self.folder)
        for file in self.shards:
            head = self.remote.read(self.repository, file, 0, 8)
            length = 8 + int.from_bytes(head, "little")
            if length > min(file.size, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file.name} of {self.repository.name} is not a whole safetensors file."
                )
            head += self.remote.read(self.repository, file, 8, length)
            path = self.folder / file.name
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as opened:
                opened.write(head)
                opened.truncate(file.size)
            os.utime(path, (0, 0))  # the commit tells versions apart
        checkpoint = Checkpoint(self.folder)
        if checkpoint.is_tied:
            has_own_head(checkpoint.tensors, self._bring_rows)

    def _bring_rows(self, rows: StoredRows) -> bytes:
        """Bring rows of a tensor to the hole that stands for them, where they are compared."""
        file = rows.info.file
        name = self._name(file)
        shard = next(shard for shard in self.shards if shard.name == name)
        data = self.remote.read(self.repository, shard, rows.offset, rows.offset + rows.nbytes)
        with file.open("r+b") as opened:
            opened.seek(rows.offset)
            opened.write(data)
        os.utime(file, (0, 0))
        return data

    @property
    def _coming(self) -> Path:
        return self.home / "coming"

    def _name(self, file: Path) -> str:
        """In the repository, where files in different folders may have the same name."""
        return file.relative_to(self.folder).as_posix()

    def _transfer(self, file: RemoteFile, folder: Path) -> None:
        is_weights = file in self.shards
        destination = FolderDestination(folder, self.repository, ELSEWHERE)

        def report(_: RemoteFile, nbytes: int) -> None:
            if self.stopped.is_set():
                raise StoppedError
            if is_weights:
                self.report(nbytes)

        def wait(seconds: float) -> None:
            if self.stopped.is_set():
                raise StoppedError
            self.remote.wait(seconds)

        transfer = DownloadPlan(self.repository, destination, (file,))
        transfer.check_space()
        transfer.run(replace(self.remote, wait=wait), report)


@contextmanager
def stream_model(
    name: str, out: Path, remote: Remote, revision: str | None = None
) -> Iterator[StreamedModel]:
    """A model of the Hub, for a conversion to `out`.

    What has come stays where the network fails or a person interrupts, and the next call goes on
    from there; after any other end nothing stays.

    Args:
        name: an alias, which means the original, or a Hub id.

    Raises:
        ModelNotFoundError, DownloadError: where it is not on the Hub, or does not come.
        ConversionError: where `out` exists, or another process is making it.
    """
    out = out.absolute()
    refuse_existing(out)
    repository = remote.repository(resolve.repositories(name, original=True)[0], revision)
    files = download.plan_download(repository, remote, adapter=False).files
    shards = tuple(file for file in files if file.name.endswith(".safetensors"))
    home = source_folder(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = claim(home, out)
        try:
            here = StreamedModel(repository, remote, home, shards)
            here.folder.mkdir(parents=True, exist_ok=True)
            here.prepare(tuple(file for file in files if file not in shards))
            yield here
            discard(home)
        except (DownloadError, KeyboardInterrupt):
            raise
        except BaseException:
            discard(home)
            raise
        finally:
            os.close(lock)
