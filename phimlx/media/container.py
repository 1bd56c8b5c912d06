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
