"""Images from a video: frames at even distances, each with its time, upright."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from phimlx.errors import MediaError
from phimlx.media.container import (
    ContainerFormat,
    declared_seconds,
    detect_container,
    open_container,
    too_long,
)
from phimlx.media.limits import Limits, raising, source_name
from phimlx.media.source import BytesLike, read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

VideoSource = str | Path | BytesLike | BinaryIO

# Packets of one video stream: four hours at 60 frames a second. One may be a few bytes long.
MAX_PACKETS = 1_000_000


@dataclass(frozen=True)
class Frame:
    """One picture of a video, RGB and upright, and when it is shown, from the beginning."""

    seconds: float
    image: Image


@dataclass(frozen=True)
class _Packet:
    """One frame's data in the file: when it is shown, in the stream's ticks, and in which group.

    A group runs from one key frame to the next, in the order of the file.
    """

    shown: int
    group: int


def read_video(source: VideoSource, frames: int, limits: Limits | None = None) -> list[Frame]:
    """Read frames of a video, in order: the one in the middle of each of `frames` equal spans.

    A video of fewer frames gives each once. It is read through twice, first without decoding, so
    that times come from the packets themselves, neither a header nor an index that may lie; then
    only the groups of pictures that hold a wanted frame are decoded.

    Raises:
        MediaError: PyAV is missing, the source cannot be had or read, holds no picture, is
            damaged, or larger than the limits allow.
    """
    limits = limits or Limits()
    if not 1 <= frames <= limits.max_frames:
        raise MediaError(
            f"{frames} frames of one video were asked for; 1 to {limits.max_frames} can be had.",
            hint=raising("max_frames") if frames > 0 else "Ask for at least one.",
        )
    name, data, form = _read(source, limits)
    with open_container(data, form, name) as container:
        stream = _video_stream(container, name, limits)
        packets = _packets(container, stream, name, limits)
        tick = stream.time_base
    wanted = _spread(packets, frames)
    groups = _groups_of(packets, set(wanted))
    with open_container(data, form, name) as container:
        stream = _video_stream(container, name, limits)
        pictures = _pictures(_decoded(container, stream, groups), wanted)
        if not pictures:
            raise MediaError(
                f"{name} is damaged: none of its frames can be decoded.",
                hint="Copy or download it again.",
            )
        for picture in pictures.values():
            _check_pixels(name, picture.width, picture.height, limits)
        start = min(packet.shown for packet in packets)
        return [
            Frame(float((shown - start) * tick), _upright(picture))
            for shown, picture in sorted(pictures.items())
        ]


def _read(source: VideoSource, limits: Limits) -> tuple[str, bytes, ContainerFormat]:
    name = source_name(source)
    data = read_bytes(source, limits)
    form = detect_container(data)
    if form is None:
        raise MediaError(
            f"{name} is not a video that can be read.",
            hint="mp4, mov, webm, mkv, avi, wmv, flv and mpeg are.",
        )
    return name, data, form


def _video_stream(container: Any, name: str, limits: Limits) -> Any:
    if not container.streams.video:
        raise MediaError(f"{name} holds no pictures.", hint="Give a sound with --audio instead.")
    stream = container.streams.video[0]
    _check_pixels(name, stream.codec_context.width, stream.codec_context.height, limits)
    declared = declared_seconds(container, stream)
    if declared is not None and declared > limits.max_seconds:
        raise too_long(name, limits)
    return stream


def _check_pixels(name: str, width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise MediaError(
            f"{name} has frames of {width} × {height} pixels; "
            f"at most {limits.max_pixels} are read.",
            hint=raising("max_pixels"),
        )


def _packets(container: Any, stream: Any, name: str, limits: Limits) -> list[_Packet]:
    """Every packet of the stream, in the order of the file, without decoding any."""
    packets: list[_Packet] = []
    group = -1
    for packet in container.demux(stream):
        shown = packet.pts if packet.pts is not None else packet.dts
        if not packet.size or shown is None:
            continue
        # What comes before the first key frame cannot be decoded.
        group += packet.is_keyframe
        if group < 0:
            continue
        packets.append(_Packet(shown, group))
        if (shown - packets[0].shown) * stream.time_base > limits.max_seconds:
            raise too_long(name, limits)
        if len(packets) > MAX_PACKETS:
            raise MediaError(
                f"{name} has more than {MAX_PACKETS} frames.", hint="Cut it into shorter videos."
            )
    if not packets:
        raise MediaError(f"{name} holds no pictures.", hint="It may have been cut short.")
    return packets


def _spread(packets: list[_Packet], frames: int) -> list[int]:
    """When the wanted frames are shown: the last one at or before the middle of each span."""
    shown = sorted({packet.shown for packet in packets})
    # The last frame is shown as long as the others are on average.
    length = (shown[-1] - shown[0]) * len(shown) / max(len(shown) - 1, 1)
    middles = (shown[0] + length * (span + 0.5) / frames for span in range(frames))
    return sorted({shown[bisect_right(shown, middle) - 1] for middle in middles})


def _groups_of(packets: list[_Packet], wanted: set[int]) -> set[int]:
    """The groups to decode; for a frame shown before its own key frame the one before it too."""
    keys = {
        group: next(members).shown
        for group, members in itertools.groupby(packets, key=lambda packet: packet.group)
    }
    groups: set[int] = set()
    for packet in packets:
        if packet.shown in wanted:
            groups.add(packet.group)
            if packet.shown < keys[packet.group]:
                groups.add(packet.group - 1)
    return groups


def _decoded(container: Any, stream: Any, groups: set[int]) -> Iterator[Any]:
    """The frames of some groups, decoded apart from the rest."""
    context = stream.codec_context
    context.thread_type = "AUTO"
    group, last = -1, max(groups)
    for packet in container.demux(stream):
        if packet.size and packet.is_keyframe:
            group += 1
            if group - 1 in groups and group not in groups:
                yield from context.decode(None)
                context.flush_buffers()
            if group > last:
                return
        if group in groups:
            yield from packet.decode()


def _pictures(decoded: Iterator[Any], wanted: list[int]) -> dict[int, Any]:
    """For each wanted time the frame shown then, by the time from which it is.

    A packet of its own may hold no picture (VP8's hidden frames): the one before it stands.
    """
    nearest: dict[int, tuple[int, Any]] = {}
    for picture in decoded:
        shown = picture.pts if picture.pts is not None else picture.dts
        for time in wanted:
            if shown <= time and (time not in nearest or nearest[time][0] < shown):
                nearest[time] = shown, picture
    return dict(nearest.values())


def _upright(picture: Any) -> Image:
    """The frame as an RGB picture, turned as its display matrix says (counter-clockwise)."""
    image: Image = picture.to_image()
    return image.rotate(picture.rotation, expand=True) if picture.rotation else image
