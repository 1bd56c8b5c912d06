"""Containers that PyAV opens, MP4 to WebM: told apart by their first bytes, opened as just that.

Knows signatures and the optional extra; knows nothing of what is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from phimlx.errors import MediaError
from phimlx.extras import optional
from phimlx.media.limits import Limits, out_of_memory, raising

if TYPE_CHECKING:
    from av.container import InputContainer


class Kind(NamedTuple):
    """A container: FFmpeg's name for it, and what a message calls it."""

    demuxer: str
    name: str


# offset of the signature, the signature, what it says
_SIGNATURES = (
    (4, b"ftyp", Kind("mov", "MP4 or M4A")),
    (4, b"moov", Kind("mov", "QuickTime")),
    (4, b"mdat", Kind("mov", "QuickTime")),
    (4, b"wide", Kind("mov", "QuickTime")),
    (0, b"\x1a\x45\xdf\xa3", Kind("matroska", "WebM or Matroska")),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", Kind("asf", "WMA or WMV")),
    (8, b"AVI ", Kind("avi", "AVI")),
    (0, b"FLV\x01", Kind("flv", "FLV")),
    (0, b"\x00\x00\x01\xba", Kind("mpeg", "MPEG")),
    (188, b"G", Kind("mpegts", "MPEG-TS")),
    (0, b"#!AMR", Kind("amr", "AMR")),
    (0, b"\xff\xf0", Kind("aac", "AAC")),
    (0, b"\xff\xf1", Kind("aac", "AAC")),
    (0, b"\xff\xf8", Kind("aac", "AAC")),
    (0, b"\xff\xf9", Kind("aac", "AAC")),
)


def container_kind(data: bytes) -> Kind | None:
    """Which container some bytes are; None where they are none of those known."""
    for offset, signature, kind in _SIGNATURES:
        if data.startswith(signature, offset) and (kind.demuxer != "mpegts" or data[:1] == b"G"):
            return kind
    return None


@contextmanager
def open_container(data: bytes, kind: Kind, name: str) -> Iterator[InputContainer]:
    """The container in `data`, with FFmpeg's errors, also those of decoding, as MediaError.

    Only the named demuxer runs: left to guess, FFmpeg takes a text for a playlist and opens
    the files and addresses that it lists.
    """
    av = _import_av(kind, name)
    try:
        with av.open(io.BytesIO(data), format=kind.demuxer, metadata_errors="replace") as container:
            yield container
    except MemoryError as error:  # FFmpeg's own, ENOMEM, among them
        raise out_of_memory(name) from error
    except av.FFmpegError as error:
        raise MediaError(
            f"{name} is not readable {kind.name}: {error.strerror}.",
            hint="Check that it plays elsewhere; a copy that was cut short cannot be read.",
        ) from error


def declared_seconds(container: Any, stream: Any) -> float | None:
    """How long a stream says it is; None where neither it nor its container does."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / 1_000_000


def too_long(name: str, limits: Limits) -> MediaError:
    """The refusal of a sound or video that passes `max_seconds`."""
    return MediaError(
        f"{name} is longer than {limits.max_seconds:g} s.", hint=raising("max_seconds")
    )


def _import_av(kind: Kind, name: str) -> Any:
    without = f"{name} is {kind.name}, which needs PyAV, and that is not installed."
    return optional("av", "video", without, MediaError)
