"""Tensors of safetensors files in blocks of rows, read ahead of the one who asks for them."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from phimlx.checkpoint.header import STORED_DTYPES, TensorInfo
from phimlx.errors import CheckpointError


@dataclass(frozen=True)
class TensorLocation:
    """A stored tensor, and where in its file its bytes begin."""

    name: str
    info: TensorInfo
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; a tensor of one dimension has a row for each number."""
        shape = self.info.shape
        return self.info.nbytes // shape[0] if shape and shape[0] else self.info.nbytes


@dataclass(frozen=True)
class RowBlock:
    """Rows `first` to `last` (not included) of tensors that have the same number of rows."""

    locations: tuple[TensorLocation, ...]
    first: int
    last: int

    @property
    def is_last(self) -> bool:
        """Tells whether no rows come after these."""
        shape = self.locations[0].info.shape
        return not shape or self.last == shape[0]

    @property
    def nbytes(self) -> int:
        return sum((self.last - self.first) * location.row_bytes for location in self.locations)


def locate(tensors: Mapping[str, TensorInfo]) -> list[TensorLocation]:
    """List where tensors stand, in that order, in files whose headers safetensors has accepted."""
    files = sorted({info.file for info in tensors.values()})
    locations = []
    for file in files:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        for name, info in tensors.items():
            if info.file == file:
                location = TensorLocation(
                    name, info, 8 + length + header[info.name]["data_offsets"][0]
                )
                first = location.offset + info.first_row * location.row_bytes
                locations.append(replace(location, offset=first))
    return sorted(locations, key=lambda location: (location.info.file, location.offset))


class WeightFiles:
    """Weight files that are on this machine."""

    keep_after: tuple[type[BaseException], ...] = ()
    """Errors after which what was converted is worth keeping."""

    spare = 0
    """Disk space that they take while they are read."""

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

    Read with plain reads rather than mapped: mapped pages count as this process's memory, and a
    file that is cut short meanwhile would kill it.

    Args:
        ahead: how many requests to read before they are asked for.
        files: how a file is opened; it is opened when its first bytes are read.

    Raises:
        CheckpointError: where a file is shorter than its header said.
    """
    size = max((request.nbytes for request in requests), default=0)
    buffers = [bytearray(size) for _ in range(ahead + 1)]  # in turn: fresh memory is slow
    files = files or WeightFiles()
    left = Counter(location.info.file for request in requests for location in request.locations)
    descriptors: dict[Path, int] = {}

    def read(number: int) -> list[memoryview]:
        request = requests[number]
        rest = memoryview(buffers[number % len(buffers)])
        parts = []
        for location in request.locations:
            file = location.info.file
            if file not in descriptors:
                descriptors[file] = files.open(file)
            part = rest[: (request.last - request.first) * location.row_bytes]
            rest = rest[len(part) :]
            begin = location.offset + request.first * location.row_bytes
            _read_whole(descriptors[file], part, begin, location)
            parts.append(part)
            left[file] -= 1
            if not left[file]:
                files.close(file, descriptors.pop(file))
        return parts

    waiting: deque[Future[list[memoryview]]] = deque()
    reader = ThreadPoolExecutor(1, "read-ahead")
    try:
        for number in range(len(requests) + ahead):
            if number < len(requests):
                waiting.append(reader.submit(read, number))
            if number >= ahead:
                parts = waiting.popleft().result()
                yield _arrays(requests[number - ahead], parts)
    finally:
        files.stop()
        reader.shutdown(cancel_futures=True)
        for descriptor in descriptors.values():
            os.close(descriptor)


def _arrays(request: RowBlock, parts: Sequence[memoryview]) -> list[mx.array]:
    """Make arrays of the rows, copied from the buffer that they were read to."""
    arrays = []
    for part, location in zip(parts, request.locations, strict=True):
        words = mx.array(part)  # type: ignore[arg-type]
        shape = (request.last - request.first, *location.info.shape[1:])
        dtype = STORED_DTYPES[location.info.dtype]
        arrays.append(words.view(dtype).reshape(shape if location.info.shape else ()))
    return arrays


def _read_whole(descriptor: int, buffer: memoryview, begin: int, location: TensorLocation) -> None:
    while buffer:
        count = os.preadv(descriptor, [buffer], begin)
        if count == 0:
            raise CheckpointError(
                f"{location.info.file.name} ends within {location.name}: it was changed while it "
                "was read.",
                hint="Download or convert the model again.",
            )
        buffer, begin = buffer[count:], begin + count
