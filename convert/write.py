"""Blocks of named tensors -> safetensors files, each block written where it belongs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx

DTYPE_NAMES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
}


@dataclass(frozen=True)
class ShardLayout:
    """The places of all tensors in shards, known before the first is computed.

    Attributes:
        shards: for each file the tensors in it, in order. Only shapes and dtypes are looked at.
        format: what the files say they are: "mlx", or "pt" as on the Hub.
    """

    shards: Mapping[str, tuple[tuple[str, mx.array], ...]]
    format: str = "mlx"

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, mx.array]], limit: int, format: str) -> ShardLayout:
        """Fill shards of at most `limit` bytes; a tensor larger than that has one of its own."""
        shards: list[list[tuple[str, mx.array]]] = []
        size = 0
        for name, array in tensors:
            if not shards or size + array.nbytes > limit:
                shards.append([])
                size = 0
            shards[-1].append((name, array))
            size += array.nbytes
        count = len(shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        return cls(
            {
                name if count > 1 else "model.safetensors": tuple(members)
                for name, members in zip(names, shards, strict=True)
            },
            format,
        )

    @property
    def tensors(self) -> dict[str, mx.array]:
        return {name: array for members in self.shards.values() for name, array in members}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.tensors.values())

    @cached_property
    def headers(self) -> dict[str, bytes]:
        """Header of each file: length and table of contents."""
        return {file: _header(members, self.format) for file, members in self.shards.items()}

    @cached_property
    def offsets(self) -> dict[str, tuple[str, int]]:
        """The file of each tensor, and where in it its bytes begin."""
        offsets = {}
        for file, members in self.shards.items():
            offset = len(self.headers[file])
            for name, array in members:
                offsets[name] = (file, offset)
                offset += array.nbytes
        return offsets


class ShardWriter:
    """The files of a layout, open for writing at any place."""

    def __init__(self, layout: ShardLayout, descriptors: Mapping[str, int]) -> None:
        self._layout = layout
        self._descriptors = descriptors
        self._templates = layout.tensors

    @classmethod
    @contextmanager
    def open(cls, folder: Path, layout: ShardLayout) -> Iterator[ShardWriter]:
        """Make the files, or take up those that a run before this one left.

        Raises:
            OSError: where a file cannot be written.
        """
        descriptors: dict[str, int] = {}
        try:
            for file, header in layout.headers.items():
                descriptors[file] = os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o644)
                _write_whole(descriptors[file], memoryview(header), 0)
            yield cls(layout, descriptors)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)

    def write(self, name: str, row: int, rows: mx.array) -> None:
        """Write some of a tensor's rows, from number `row` on."""
        template = self._templates[name]
        assert rows.dtype == template.dtype
        assert rows.shape[1:] == template.shape[1:]
        file, offset = self._layout.offsets[name]
        data = _bytes(rows)
        row_bytes = template.nbytes // template.shape[0] if template.shape else 0
        _write_whole(self._descriptors[file], data, offset + row * row_bytes)

    def sync(self) -> None:
        """Return when what has been written is on the disk."""
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)


def write_index(folder: Path, layout: ShardLayout) -> None:
    """The index that tells the file of each tensor, where there is more than one."""
    if len(layout.shards) > 1:
        weight_map = {name: file for name, (file, _) in layout.offsets.items()}
        index = {
            "metadata": {"total_size": layout.nbytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))


def _header(members: Iterable[tuple[str, mx.array]], format: str) -> bytes:
    """Length and table of contents. Source: https://github.com/huggingface/safetensors#format"""
    table: dict[str, object] = {"__metadata__": {"format": format}}
    offset = 0
    for name, array in members:
        end = offset + array.nbytes
        table[name] = {
            "dtype": DTYPE_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    return len(text).to_bytes(8, "little") + text


def _bytes(array: mx.array) -> memoryview:
    """The array's bytes in row order, not copied where it already stands so."""
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    view = memoryview(mx.contiguous(array).view(words))  # type: ignore[arg-type]
    return view.cast("B")


def _write_whole(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
