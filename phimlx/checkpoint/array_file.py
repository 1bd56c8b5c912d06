"""Safetensors files written and read an array at a time, with a checksum over all of them.

An array is in memory once while it is written, however many there are, and nothing of a file is
mapped: another process may do with it what it likes.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from phimlx.checkpoint.header import list_tensors
from phimlx.checkpoint.tensors import ELEMENT_DTYPES, STORED_DTYPES, StoredRows, TensorInfo
from phimlx.errors import CacheError, CheckpointError
from phimlx.files import reason, replacing

NAMES = {dtype: name for name, dtype in {**STORED_DTYPES, "I32": mx.int32}.items()}


def write_array_file(
    path: Path,
    forms: Mapping[str, tuple[tuple[int, ...], mx.Dtype]],
    arrays: Iterator[tuple[str, mx.array]],
    metadata: Mapping[str, str],
) -> None:
    """Replace a file, readable by its owner alone, by arrays; as a whole or not at all.

    Args:
        forms: shape and dtype of each array, by name.
        arrays: the same names in the same order.
        metadata: kept in the header.

    Raises:
        OSError: where it cannot be written.
        ValueError: for arrays of other forms.
    """
    table: dict[str, object] = {"__metadata__": {**metadata, "checksum": "0" * 8}}
    end = 0
    for name, (shape, dtype) in forms.items():
        begin, end = end, end + mx.zeros(shape, dtype).nbytes
        table[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    head = _header(table)
    checksum = _checksum(metadata)
    with replacing(path, private=True) as temporary, temporary.open("r+b", buffering=0) as file:
        file.seek(len(head))  # which comes last: a file that was cut short has none
        for (name, form), (given, array) in zip(forms.items(), arrays, strict=True):
            if (given, (array.shape, array.dtype)) != (name, tuple(form)):
                raise ValueError(f"{given} is {array.dtype} {array.shape}, not {name} {form}")
            checksum = zlib.crc32(_write(file, array), checksum)
        table["__metadata__"] = {**metadata, "checksum": f"{checksum:08x}"}
        file.seek(0)
        _write_all(file, memoryview(_header(table)))


class ArrayFile:
    """A file that `write_array_file` may have written: its header has been read, no array yet.

    Attributes:
        tensors: by name, in the order of the file.
        metadata: without the checksum.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        try:
            with safe_open(str(path), framework="mlx") as opened:
                found = opened.metadata() or {}
            tensors = dict(list_tensors(path))
        except (CheckpointError, SafetensorError, OSError) as error:
            raise CacheError(f"{path} is damaged or no file of a cache.") from error
        self.tensors: dict[str, TensorInfo] = dict(
            sorted(tensors.items(), key=lambda item: item[1].offset)
        )
        self._checksum = found.pop("checksum", "")
        self.metadata: dict[str, str] = found

    def read(self) -> Iterator[tuple[str, mx.array]]:
        """Read every array, in the order of the file.

        Raises:
            CacheError: after the last where the checksum is not theirs, or where the file ends
                before.
        """
        checksum = _checksum(self.metadata)
        for name, info in self.tensors.items():
            data = self._bytes(info)
            checksum = zlib.crc32(data, checksum)
            yield name, _array(info, data)
        if self._checksum != f"{checksum:08x}":
            raise CacheError(f"{self._path} is damaged: its checksum is not that of its contents.")

    def read_one(self, name: str) -> mx.array:
        """Read an array alone, which is not checked. Raises CacheError where that cannot be."""
        return _array(self.tensors[name], self._bytes(self.tensors[name]))

    def _bytes(self, info: TensorInfo) -> bytearray:
        data = bytearray(info.nbytes)
        try:
            StoredRows(info, 0, info.count).read_into(self._file.fileno(), memoryview(data))
        except (CheckpointError, OSError) as error:
            raise CacheError(f"{self._path} cannot be read whole.") from error
        return data


@contextmanager
def open_array_file(path: Path) -> Iterator[ArrayFile]:
    """Open a file of arrays.

    Raises:
        CacheError: one sentence, where it is missing, unreadable, no regular file, or damaged.
    """
    try:
        file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115
    except (FileNotFoundError, ValueError) as error:
        raise CacheError(f"There is no file {path}.") from error
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {reason(error)}.") from error
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CacheError(f"{path} is not a regular file.")
        opened = ArrayFile(path, file)
        if not os.path.exists(path) or not os.path.samestat(os.stat(path), status):
            raise CacheError(f"{path} was replaced while it was read.")
        yield opened


def _header(table: Mapping[str, object]) -> bytes:
    """Source: https://github.com/huggingface/safetensors#format"""
    text = json.dumps(table, ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checksum(metadata: Mapping[str, str]) -> int:
    return zlib.crc32(json.dumps(metadata, sort_keys=True, ensure_ascii=True).encode())


def _write(file: IO[bytes], array: mx.array) -> memoryview:
    """Write an array's bytes, and return them."""
    data = memoryview(mx.contiguous(array).view(mx.uint8)).cast("B")  # type: ignore[arg-type]
    _write_all(file, data)
    return data


def _write_all(file: IO[bytes], data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _array(info: TensorInfo, data: bytearray) -> mx.array:
    array = mx.array(memoryview(data))  # type: ignore[arg-type]
    return array.view(ELEMENT_DTYPES[info.dtype]).reshape(info.shape)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
