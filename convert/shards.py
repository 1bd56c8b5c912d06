"""A stream of named tensors -> safetensors files, written front to back.

Knows the safetensors format and shard sizes; holds no more than the tensor that it is writing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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
class Layout:
    """Where every tensor will stand, known before the first is computed.

    Attributes:
        shards: for each file the tensors in it, in order, which is the order of the stream.
    """

    shards: Mapping[str, tuple[tuple[str, mx.array], ...]]

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, mx.array]], limit: int) -> Layout:
        """Fill shards of at most `limit` bytes; a tensor larger than that has one of its own.

        Args:
            tensors: in the order of the stream; only shapes and dtypes are looked at.
        """
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
            }
        )

    @property
    def tensors(self) -> dict[str, mx.array]:
        return {name: array for members in self.shards.values() for name, array in members}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.tensors.values())


def write_shards(folder: Path, layout: Layout, stream: Iterator[tuple[str, mx.array]]) -> None:
    """Write a stream of tensors, in the order of `layout`, as MLX would: files, then the index.

    Raises:
        OSError: where a file cannot be written.
    """
    for file_name, members in layout.shards.items():
        with (folder / file_name).open("wb") as file:
            file.write(_header(members))
            for expected, template in members:
                name, array = next(stream)
                assert (name, array.shape, array.dtype) == (
                    expected,
                    template.shape,
                    template.dtype,
                )
                file.write(_bytes(array))
                del array
    left_over = next(stream, None)  # which also lets the stream finish its last tensor
    assert left_over is None
    if len(layout.shards) > 1:
        weight_map = {
            name: file_name for file_name, members in layout.shards.items() for name, _ in members
        }
        index = {
            "metadata": {"total_size": layout.nbytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))


def _header(members: Iterable[tuple[str, mx.array]]) -> bytes:
    """Length and table of contents. Source: https://github.com/huggingface/safetensors#format"""
    table: dict[str, object] = {"__metadata__": {"format": "mlx"}}
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
    return memoryview(mx.contiguous(array).view(words))  # type: ignore[arg-type]
