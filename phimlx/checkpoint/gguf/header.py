"""Headers of GGUF files: settings, and which tensors a file holds, where, in what form.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from phimlx.checkpoint.gguf.blocks import BY_NUMBER, TYPE_NAMES, BlockType
from phimlx.checkpoint.gguf.find import MAGIC
from phimlx.errors import CheckpointError, shortened
from phimlx.files import read_beginning
from phimlx.sizes import size_text

VERSIONS = (2, 3)
ALIGNMENT = 32  # where the file says nothing of it

# A header of Phi-4-mini's has 12 MB, and 400,000 strings.
MAX_HEADER = 64_000_000  # bytes
MAX_COUNT = 1 << 16  # settings, or tensors
MAX_STRINGS = 1 << 21  # in all lists together
MAX_NAME = 256  # bytes; llama.cpp's have at most 63
MAX_DIMENSIONS = 4
MAX_SIZE = 1 << 48  # numbers of a tensor

NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9

AGAIN = "Download the file again, or get the original model's folder."
ORIGINAL = "Get the original model's folder, or a GGUF file that llama.cpp made since."

Setting = int | float | bool | str | list[str] | np.ndarray[Any, Any]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor, as its file's header describes it.

    Attributes:
        shape: rows first, as everywhere but in the file itself.
        type: how its rows are packed; None for a type that phimlx does not read.
        type_name: llama.cpp's name of that.
        offset: of its first byte in the file.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    type: BlockType | None
    type_name: str
    offset: int

    @property
    def nbytes(self) -> int:
        assert self.type is not None
        size = self.type.row_bytes(self.shape[-1])
        for dimension in self.shape[:-1]:
            size *= dimension
        return size


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the weights of one file.

    Attributes:
        settings: by key. A list of numbers is an array; text that is not UTF-8 has surrogates.
    """

    file: Path
    settings: Mapping[str, Setting]
    tensors: Mapping[str, GgufTensor]


def read_header(file: Path) -> GgufHeader:
    """Read and check the header of a GGUF file; takes time and memory for `MAX_HEADER` at most.

    Raises:
        CheckpointError: one sentence, where it is no GGUF file, damaged, or of a version or byte
            order that phimlx does not read.
    """
    data, size = read_beginning(file, MAX_HEADER, CheckpointError)
    reader = _Reader(file, data, size)
    _check_version(file, reader)
    tensor_count, setting_count = reader.numbers("QQ")
    for what, count in (("tensors", tensor_count), ("settings", setting_count)):
        if count > MAX_COUNT:
            raise damaged(file, f"it counts {count} {what}, of at most {MAX_COUNT}")
    settings: dict[str, Setting] = {}
    for _ in range(setting_count):
        key = reader.name("a setting")
        if key in settings:
            raise damaged(file, f"it has the setting {shortened(key)} twice")
        (kind,) = reader.numbers("I")
        settings[key] = reader.value(kind, key)
    described = {}
    for _ in range(tensor_count):
        name = reader.name("a tensor")
        if name in described:
            raise damaged(file, f"it has the tensor {shortened(name)} twice")
        described[name] = _describe(file, reader, name)
    alignment = _alignment(file, settings)
    start = reader.position + -reader.position % alignment if described else reader.position
    tensors = {}
    for name, (shape, number, offset) in described.items():
        if offset % alignment:
            raise damaged(
                file, f"{shortened(name)} begins at {offset}, not a multiple of {alignment}"
            )
        kind_name = TYPE_NAMES.get(number, f"type {number}")
        tensors[name] = GgufTensor(
            file, name, shape, BY_NUMBER.get(number), kind_name, start + offset
        )
    _check_places(file, tensors, start, size)
    return GgufHeader(file, settings, tensors)


def damaged(file: Path, why: str) -> CheckpointError:
    """Make the error of a file whose header contradicts itself or the format."""
    return CheckpointError(f"{file.name} is not a whole GGUF file: {why}.", hint=AGAIN)


class _Reader:
    """Reads one value of a header after the other, none of them past its end."""

    def __init__(self, file: Path, data: bytes, size: int) -> None:
        self.position = 0
        self._file, self._data, self._size = file, data, size
        self._strings = 0

    def take(self, count: int) -> bytes:
        return self._data[self._advance(count) : self.position]

    def numbers(self, form: str) -> tuple[Any, ...]:
        form = f"<{form}"
        return struct.unpack_from(form, self._data, self._advance(struct.calcsize(form)))

    def name(self, what: str) -> str:
        (length,) = self.numbers("Q")
        if not 0 < length <= MAX_NAME:
            raise damaged(self._file, f"the name of {what} has {length} bytes, of 1 to {MAX_NAME}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise damaged(self._file, f"the name of {what} is not UTF-8 text") from None

    def value(self, kind: int, key: str) -> Setting:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            return self._array(key)
        if kind not in NUMBERS:
            raise damaged(self._file, f"{shortened(key)} has the unknown type {kind}")
        value: int | float | bool = self.numbers(NUMBERS[kind])[0]
        return value

    def _array(self, key: str) -> Setting:
        kind, count = self.numbers("IQ")
        if kind == STRING:
            self._strings += count
            if self._strings > MAX_STRINGS:
                raise damaged(self._file, f"its lists count over {MAX_STRINGS} strings")
            return [self._string() for _ in range(count)]
        if kind not in NUMBERS:
            what = "a list of lists" if kind == ARRAY else f"of the unknown type {kind}"
            raise damaged(self._file, f"{shortened(key)} is {what}")
        dtype = np.dtype(f"<{NUMBERS[kind]}")
        start = self._advance(count * dtype.itemsize)
        return np.frombuffer(self._data, dtype, count, start).copy()  # frees the header

    def _string(self) -> str:
        (length,) = self.numbers("Q")
        return self.take(length).decode(errors="surrogateescape")

    def _advance(self, count: int) -> int:
        """Step over so many bytes that are there; where they begin."""
        begin = self.position
        if count > len(self._data) - begin:
            if len(self._data) == self._size:
                raise damaged(self._file, "it ends within its header")
            raise damaged(self._file, f"its header is larger than {size_text(MAX_HEADER)}")
        self.position += count
        return begin


def _check_version(file: Path, reader: _Reader) -> None:
    if reader.take(min(4, len(reader._data))) != MAGIC:
        raise CheckpointError(f"{file.name} is not a GGUF file.", hint=AGAIN)
    (version,) = reader.numbers("I")
    if version in VERSIONS:
        return
    if version and not version & 0xFFFF:
        raise CheckpointError(
            f"{file.name} is a GGUF file of big-endian machines, and only little-endian ones are "
            "read.",
            hint="Get the file for ordinary machines, or the original model's folder.",
        )
    raise CheckpointError(
        f"{file.name} is GGUF version {version}, and versions 2 and 3 are read.", hint=ORIGINAL
    )


def _alignment(file: Path, settings: Mapping[str, Setting]) -> int:
    """The number that divides where a tensor begins, from the end of the header on."""
    found = settings.get("general.alignment", ALIGNMENT)
    if type(found) is not int or found < 1 or found & (found - 1):
        raise damaged(file, f"its alignment is {shortened(found)}, not a power of two")
    return found


def _describe(file: Path, reader: _Reader, name: str) -> tuple[tuple[int, ...], int, int]:
    """Shape, type and offset of a tensor."""
    (dimensions,) = reader.numbers("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise damaged(
            file, f"{shortened(name)} has {dimensions} dimensions, of 1 to {MAX_DIMENSIONS}"
        )
    widths = reader.numbers("Q" * dimensions)
    size = 1
    for width in widths:
        size *= width
    if not 0 < size <= MAX_SIZE:
        raise damaged(file, f"{shortened(name)} has the impossible shape {list(widths[::-1])}")
    number, offset = reader.numbers("IQ")
    kind = BY_NUMBER.get(number)
    if kind is not None and widths[0] % kind.numbers:
        raise damaged(
            file,
            f"{shortened(name)} is {widths[0]} wide, which blocks of {kind.numbers} do not divide",
        )
    return widths[::-1], number, offset


def _check_places(file: Path, tensors: Mapping[str, GgufTensor], start: int, size: int) -> None:
    """Refuse tensors that do not lie side by side within the file."""
    placed = sorted(_places(tensors), key=lambda place: place[0])
    for _, end, name in placed:
        if end > size:
            raise damaged(file, f"{shortened(name)} ends at byte {end}, and the file at {size}")
    for (_, end, name), (begin, _, other) in pairwise(placed):
        if end > begin:
            raise damaged(file, f"{shortened(name)} and {shortened(other)} overlap")


def _places(tensors: Mapping[str, GgufTensor]) -> Iterator[tuple[int, int, str]]:
    """Where tensors begin and end; those of a type that is not read have no known end."""
    for name, tensor in tensors.items():
        nbytes = 1 if tensor.type is None else tensor.nbytes
        yield tensor.offset, tensor.offset + nbytes, name
