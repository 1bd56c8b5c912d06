"""The chunk of a sound file that holds its samples: how many bytes it declares, how many there are.

libsndfile reads what is there without a word where a file was cut short, and nothing where the
recorder was killed before it wrote the length.

Sources: IBM and Microsoft, "Multimedia Programming Interface and Data Specifications 1.0" (RIFF);
EBU Tech 3306 (RF64); Sony, "Wave64"; Apple, "Audio Interchange File Format" and "Core Audio
Format"; Electronic Arts, "8SVX"; Sun's `audio_filehdr`; RFC 3533 (Ogg); NIST's SPHERE.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

MOST_CHUNKS = 4096  # looked at before the samples; no recorder writes so many
# Programs that write to a pipe declare 2 or 4 GB, less a header, of whatever follows.
_STREAMED = 65536
_ENDLESS = 1 << 62  # -1 and its neighbours in 64 bits


@dataclass(frozen=True)
class DataChunk:
    """Bytes of samples in a sound file.

    Attributes:
        declared: how many the header says; None where it was never told.
        present: how many there are.
    """

    declared: int | None
    present: int
    size_field: tuple[int, str, int]  # offset, struct format, value that says what is there

    @property
    def missing(self) -> int:
        """Return how many declared bytes are not there."""
        return 0 if self.declared is None else self.declared - self.present

    @property
    def share(self) -> float:
        """Return how much of what was declared is there, from 0 to 1."""
        return self.present / self.declared if self.declared and self.missing else 1.0

    def repaired(self, data: bytes) -> bytes:
        """Return the file with a header that declares what is there."""
        if self.declared is not None and not self.missing:
            return data
        offset, form, value = self.size_field
        return data[:offset] + struct.pack(form, value) + data[offset + struct.calcsize(form) :]


@dataclass(frozen=True)
class _ChunkLayout:
    """A format made of chunks, each an id, a size and so many bytes.

    Attributes:
        first: where the first chunk begins.
        size: struct format of a size.
        name: id of the chunk of samples.
        inner: bytes in that chunk before the samples.
        own: bytes that a size counts of its chunk's id and size.
    """

    magic: re.Pattern[bytes]
    first: int
    size: str
    name: bytes
    inner: int = 0
    id_bytes: int = 4
    own: int = 0
    align: int = 2

    @property
    def header(self) -> int:
        return self.id_bytes + struct.calcsize(self.size)

    def chunk(self, data: bytes, place: int) -> tuple[bytes, int] | None:
        """Read id and size at `place`; None where there is no chunk."""
        if place + self.header > len(data):
            return None
        name = data[place : place + 4]
        (size,) = struct.unpack_from(self.size, data, place + self.id_bytes)
        return (name, size - self.own) if name.isascii() and name.decode().isprintable() else None

    def behind(self, place: int, size: int) -> int:
        """Return where the chunk after that at `place` begins."""
        end = place + self.header + size
        return end + -end % self.align


_LAYOUTS = (
    _ChunkLayout(re.compile(rb"(RIFF|RF64|BW64).{4}WAVE", re.DOTALL), 12, "<I", b"data"),
    _ChunkLayout(re.compile(rb"RIFX.{4}WAVE", re.DOTALL), 12, ">I", b"data"),
    _ChunkLayout(re.compile(rb"FORM.{4}AIF[FC]", re.DOTALL), 12, ">I", b"SSND", inner=8),
    _ChunkLayout(re.compile(rb"FORM.{4}(8SVX|16SV)", re.DOTALL), 12, ">I", b"BODY"),
    _ChunkLayout(
        re.compile(rb"riff.{20}wave", re.DOTALL), 40, "<q", b"data", id_bytes=16, own=24, align=8
    ),
    _ChunkLayout(re.compile(rb"caff"), 8, ">q", b"data", inner=4, align=1),
)
_SPHERE_SAMPLES = re.compile(rb"NIST_1A\n.*?\nsample_count -i (\d{1,12})\s", re.DOTALL)
_SUN = {b".snd": ">I", b"dns.": "<I"}


def find_data_chunk(data: bytes) -> DataChunk | None:
    """Find the samples of a WAV, RF64, W64, AIFF, AIFC, 8SVX, CAF or AU; None in anything else."""
    if data[:4] in _SUN and len(data) >= 12:
        return _sun_data(data, _SUN[data[:4]])
    layout = next((each for each in _LAYOUTS if each.magic.match(data)), None)
    if layout is None:
        return None
    place, long_size = layout.first, None
    for _ in range(MOST_CHUNKS):
        chunk = layout.chunk(data, place)
        if chunk is None:
            return None
        name, size = chunk
        if name == layout.name:
            return _chunk_data(data, layout, place, size, long_size)
        if name == b"ds64":
            long_size = place + layout.header + 8
        if size < 0:
            return None
        place = layout.behind(place, size)
    return None


def _chunk_data(
    data: bytes, layout: _ChunkLayout, place: int, size: int, long_size: int | None
) -> DataChunk:
    start = place + layout.header
    size_at, form = place + layout.id_bytes, layout.size
    if long_size is not None and size == 0xFFFFFFFF and long_size + 8 <= len(data):
        size_at, form = long_size, "<Q"
        (size,) = struct.unpack_from(form, data, size_at)
    present = len(data) - start
    field = size_at, form, present + layout.own
    empty = size <= layout.inner
    if (empty and not _ends_in_chunks(data, layout, start + max(0, size))) or _is_streamed(
        size, present, form
    ):
        return DataChunk(None, max(0, present - layout.inner), field)
    declared = max(0, size - layout.inner)
    return DataChunk(declared, max(0, min(size, present) - layout.inner), field)


def _sun_data(data: bytes, form: str) -> DataChunk:
    start, size = struct.unpack_from(form + form[1], data, 4)
    present = max(0, len(data) - start)
    field = 8, form, present
    if (size == 0 and present > 0) or _is_streamed(size, present, form):
        return DataChunk(None, present, field)
    return DataChunk(size, min(size, present), field)


def _is_streamed(size: int, present: int, form: str) -> bool:
    """Tell whether a size stands for one that was not known when it was written."""
    if 0 <= size <= present:
        return False
    if struct.calcsize(form) == 8:
        return not 0 <= size < _ENDLESS
    return size >= (1 << 32) - _STREAMED or abs(size - (1 << 31)) <= _STREAMED


def _ends_in_chunks(data: bytes, layout: _ChunkLayout, place: int) -> bool:
    """Tell whether chunks, or nothing, follow from `place` to the end of the file."""
    for _ in range(MOST_CHUNKS):
        if place >= len(data):
            return place < len(data) + layout.align
        chunk = layout.chunk(data, place)
        if chunk is None or chunk[1] < 0:
            return False
        place = layout.behind(place, chunk[1])
    return False


def sphere_samples(data: bytes) -> int | None:
    """Return how many samples of each channel a SPHERE file declares; None for anything else."""
    told = _SPHERE_SAMPLES.match(data[:4096])
    return int(told[1]) if told else None


def is_open_ogg(data: bytes) -> bool:
    """Tell whether an Ogg file breaks off: its last page is not whole or not marked as the last."""
    if not data.startswith(b"OggS"):
        return False
    last = data.rfind(b"OggS\0")
    table = last + 27
    if table > len(data):
        return True
    lengths = data[table : table + data[last + 26]]
    whole = len(lengths) == data[last + 26] and table + len(lengths) + sum(lengths) <= len(data)
    return not whole or not data[last + 5] & 4
