"""Containers that PyAV opens, MP4 to WebM: told apart by their first bytes, opened as just that."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from phimlx.errors import MediaError
from phimlx.extras import import_extra
from phimlx.media.limits import Limits, out_of_memory, raising

if TYPE_CHECKING:
    from av.container import InputContainer


class ContainerFormat(NamedTuple):
    """A container: FFmpeg's name for it, and what a message calls it."""

    demuxer: str
    name: str


# offset of the signature, the signature, what it says
_SIGNATURES = (
    (4, b"ftyp", ContainerFormat("mov", "MP4 or M4A")),
    (4, b"moov", ContainerFormat("mov", "QuickTime")),
    (4, b"mdat", ContainerFormat("mov", "QuickTime")),
    (4, b"wide", ContainerFormat("mov", "QuickTime")),
    (0, b"\x1a\x45\xdf\xa3", ContainerFormat("matroska", "WebM or Matroska")),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", ContainerFormat("asf", "WMA or WMV")),
    (8, b"AVI ", ContainerFormat("avi", "AVI")),
    (0, b"FLV\x01", ContainerFormat("flv", "FLV")),
    (0, b"\x00\x00\x01\xba", ContainerFormat("mpeg", "MPEG")),
    (188, b"G", ContainerFormat("mpegts", "MPEG-TS")),
    (0, b"#!AMR", ContainerFormat("amr", "AMR")),
    (0, b"\xff\xf0", ContainerFormat("aac", "AAC")),
    (0, b"\xff\xf1", ContainerFormat("aac", "AAC")),
    (0, b"\xff\xf8", ContainerFormat("aac", "AAC")),
    (0, b"\xff\xf9", ContainerFormat("aac", "AAC")),
)


def detect_container(data: bytes) -> ContainerFormat | None:
    """Tell the container of some bytes by their signature; None where it is none of those known."""
    for offset, signature, form in _SIGNATURES:
        if data.startswith(signature, offset) and (form.demuxer != "mpegts" or data[:1] == b"G"):
            return form
    return None


@contextmanager
def open_container(data: bytes, form: ContainerFormat, name: str) -> Iterator[InputContainer]:
    """Open the container in `data`, with FFmpeg's errors, also those of decoding, as MediaError.

    Only the named demuxer runs: left to guess, FFmpeg takes a text for a playlist and opens
    the files and addresses that it lists.
    """
    av = _import_av(form, name)
    try:
        with av.open(io.BytesIO(data), format=form.demuxer, **_tolerance(av)) as container:
            yield container
    except MemoryError as error:  # FFmpeg's own, ENOMEM, among them
        raise out_of_memory(name) from error
    except av.FFmpegError as error:
        raise MediaError(
            f"{name} is not readable {form.name}: {error.strerror}.",
            hint="Check that it plays elsewhere; a copy that was cut short cannot be read.",
        ) from error


def declared_seconds(container: Any, stream: Any) -> float | None:
    """Return the seconds that a stream declares; None where neither it nor its container does."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / 1_000_000


def is_cut_short(data: bytes, form: ContainerFormat) -> bool:
    """Tell whether a container ends before the size that it declares; False where it has none.

    Sources: ISO 14496-12, 4.2 (boxes); RFC 8794, 4 and RFC 9559, 5.1 (EBML, Segment); Microsoft,
    "AVI RIFF File Reference" and "Advanced Systems Format", 3.2; Adobe, "Flash Video File
    Format", E.3; ISO 13818-1, 2.4.3.2 (packets).
    """
    declared = _DECLARED_SIZES.get(form.demuxer)
    return declared is not None and declared(data) > len(data)


def _mov_size(data: bytes) -> int:
    place = 0
    while 0 <= place <= len(data) - 16:
        size = int.from_bytes(data[place : place + 4], "big")
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if size < 8:  # 0: to the end
            return len(data)
        place += size
    return place if place > len(data) else len(data)


def _matroska_size(data: bytes) -> int:
    place = 4
    header, place = _ebml_number(data, place)
    place += header
    if data[place : place + 4] != b"\x18\x53\x80\x67":
        return len(data)
    size, start = _ebml_number(data, place + 4)
    streamed = size == (1 << 7 * (start - place - 4)) - 1
    return len(data) if streamed else start + size


def _ebml_number(data: bytes, place: int) -> tuple[int, int]:
    """A number of 1 to 8 bytes, of which the first says how many, and where it ends."""
    first = data[place] if place < len(data) else 0
    width = 9 - first.bit_length()
    number = int.from_bytes(data[place : place + width], "big")
    return number & ((1 << 7 * width) - 1), place + width


def _avi_size(data: bytes) -> int:
    place = 0
    while data[place : place + 4] == b"RIFF":
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        if size in (0, 0xFFFFFFFF):
            return len(data)
        place += 8 + size
    return place


def _asf_size(data: bytes) -> int:
    properties = data.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"), 0, 65536)
    if properties < 0 or properties + 92 > len(data) or data[properties + 88] & 1:  # broadcast
        return len(data)
    return int.from_bytes(data[properties + 40 : properties + 48], "little")


def _flv_size(data: bytes) -> int:
    """One more byte than there is, where the last tag's length does not lead to its beginning."""
    tag = int.from_bytes(data[-4:], "big")
    place = len(data) - 4 - tag
    whole = place >= 9 and tag - 11 == int.from_bytes(data[place + 1 : place + 4], "big")
    return len(data) + (not whole)


def _mpegts_size(data: bytes) -> int:
    return len(data) + -len(data) % 188


# Those whose headers say how long they are; of the others FFmpeg estimates it from what is there.
HEADERS_TELL_LENGTH = frozenset({"mov", "matroska", "asf", "flv"})
_DECLARED_SIZES = {
    "mov": _mov_size,
    "matroska": _matroska_size,
    "avi": _avi_size,
    "asf": _asf_size,
    "flv": _flv_size,
    "mpegts": _mpegts_size,
}


def too_long(name: str, limits: Limits) -> MediaError:
    """Make the refusal of a sound or video that passes `max_seconds`."""
    return MediaError(
        f"{name} is longer than {limits.max_seconds:g} s.", hint=raising("max_seconds")
    )


def _tolerance(av: Any) -> dict[str, str]:
    """Arguments that let a title be in another encoding than UTF-8, as PyAV 19 always does."""
    return {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}


def _import_av(form: ContainerFormat, name: str) -> Any:
    without = f"{name} is {form.name}, which needs PyAV, and that is not installed."
    return import_extra("av", "video", without, MediaError)
