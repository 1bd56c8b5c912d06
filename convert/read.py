"""Rows of a model's tensors in blocks, read ahead of the one who asks for them."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from phimlx.checkpoint.tensors import StoredRows, Tensor, Tensors


@dataclass(frozen=True)
class RowBlock:
    """Rows `first` to `last` (not included) of tensors that have the same number of rows."""

    tensors: tuple[Tensor, ...]
    first: int
    last: int

    @property
    def is_last(self) -> bool:
        """Tells whether no rows come after these."""
        return self.last == self.tensors[0].count

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors that these rows stand for, in all blocks together all."""
        count = self.tensors[0].count
        total = stored_bytes(self.tensors)
        return total * self.last // count - total * self.first // count

    @cached_property
    def reads(self) -> tuple[tuple[StoredRows, ...], ...]:
        """What is read for each tensor; several blocks may read the same."""
        return tuple(tensor.reads(self.first, self.last) for tensor in self.tensors)

    @property
    def all_reads(self) -> Iterator[StoredRows]:
        """What is read for all of them together."""
        return (rows for part in self.reads for rows in part)

    def rows(self, parts: Sequence[Sequence[mx.array]]) -> list[mx.array]:
        """Make the rows of each tensor of what was read for it."""
        return [
            tensor.rows(self.first, self.last, read)
            for tensor, read in zip(self.tensors, parts, strict=True)
        ]


def stored_bytes(tensors: Sequence[Tensor]) -> int:
    """Count the bytes that tensors are stored in."""
    return sum(rows.nbytes for tensor in tensors for rows in tensor.reads(0, tensor.count))


def in_file_order(tensors: Tensors) -> dict[str, Tensor]:
    """Sort tensors by where they are read: in the last of their files, if they lie in several."""

    def end(item: tuple[str, Tensor]) -> tuple[Path, int]:
        tensor = item[1]
        return max((rows.info.file, rows.offset) for rows in tensor.reads(0, tensor.count))

    return dict(sorted(tensors.items(), key=end))


class WeightFiles:
    """Weight files that are on this machine."""

    keep_after: tuple[type[BaseException], ...] = ()
    """Errors after which what was converted is worth keeping."""

    def spare(self, order: Sequence[frozenset[Path]]) -> int:
        """Disk space that they take while they are read.

        Args:
            order: the files of each tensor, in the order in which they are read.
        """
        return 0

    def open(self, file: Path) -> int:
        """A descriptor of a file that is needed from now on."""
        return os.open(file, os.O_RDONLY)

    def close(self, file: Path, descriptor: int) -> None:
        """Called when the last of a file's bytes has been read."""
        os.close(descriptor)

    def stop(self) -> None:
        """Called when nothing more is needed, from another thread than `open`."""


def read_blocks(
    requests: Sequence[RowBlock], ahead: int, files: WeightFiles | None = None
) -> Iterator[list[mx.array]]:
    """Read the rows of each request's tensors, in order, while those of the next are being read.

    What several requests read is read once, and kept for them. Read with plain reads rather than
    mapped: mapped pages count as this process's memory, and a file that is cut short meanwhile
    would kill it.

    Args:
        ahead: how many requests to read before they are asked for.
        files: how a file is opened; it is opened when its first bytes are read.

    Raises:
        CheckpointError: where a file is shorter than its header said.
    """
    uses = Counter(rows for request in requests for rows in request.all_reads)
    unread = set(uses)
    left = Counter(rows.info.file for rows in unread)
    size = max(
        (sum(rows.nbytes for rows in request.all_reads if uses[rows] == 1) for request in requests),
        default=0,
    )
    buffers = [bytearray(size) for _ in range(ahead + 1)]  # in turn: fresh memory is slow
    files = files or WeightFiles()
    descriptors: dict[Path, int] = {}
    held: dict[StoredRows, mx.array] = {}
    to_come = uses.copy()

    def read(number: int) -> dict[StoredRows, memoryview]:
        rest = memoryview(buffers[number % len(buffers)])
        parts: dict[StoredRows, memoryview] = {}
        for rows in requests[number].all_reads:
            if rows not in unread:
                continue  # an earlier request has read them
            file = rows.info.file
            if file not in descriptors:
                descriptors[file] = files.open(file)
            if uses[rows] > 1:
                parts[rows] = memoryview(bytearray(rows.nbytes))
            else:
                parts[rows], rest = rest[: rows.nbytes], rest[rows.nbytes :]
            rows.read_into(descriptors[file], parts[rows])
            unread.remove(rows)
            left[file] -= 1
            if not left[file]:
                files.close(file, descriptors.pop(file))
        return parts

    def arrays(number: int, parts: dict[StoredRows, memoryview]) -> list[mx.array]:
        request = requests[number]
        held.update({rows: rows.array(data) for rows, data in parts.items()})
        made = request.rows([[held[rows] for rows in part] for part in request.reads])
        for rows in request.all_reads:
            to_come[rows] -= 1
            if not to_come[rows]:
                del held[rows]
        return made

    waiting: deque[Future[dict[StoredRows, memoryview]]] = deque()
    reader = ThreadPoolExecutor(1, "read-ahead")
    try:
        for number in range(len(requests) + ahead):
            if number < len(requests):
                waiting.append(reader.submit(read, number))
            if number >= ahead:
                yield arrays(number - ahead, waiting.popleft().result())
    finally:
        files.stop()
        reader.shutdown(cancel_futures=True)
        for descriptor in descriptors.values():
            os.close(descriptor)
