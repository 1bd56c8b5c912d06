"""Frames of a video: the right ones, upright, with their times, in every container."""

from __future__ import annotations

import io
import struct
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from phimlx.errors import MediaError
from phimlx.media.audio import load_audio
from phimlx.media.video import read_video
from tests.media.sounds import av_video

CLIPS: dict[str, dict[str, Any]] = {
    "mp4": {},
    "h264 with B frames": {"codec": "libx264", "bf": "3"},
    "h264 with open groups": {
        "codec": "libx264",
        "x264-params": "open-gop=1:bframes=3:keyint=10:scenecut=0:log-level=none",
    },
    "mov": {"container": "mov"},
    "vp9": {"container": "webm", "codec": "libvpx-vp9"},
    "vp8 with hidden frames": {
        "container": "webm",
        "codec": "libvpx",
        "auto-alt-ref": "1",
        "lag-in-frames": "16",
    },
    "mkv": {"container": "matroska", "codec": "libx264", "bf": "3"},
    "avi": {"container": "avi"},
    "avi with B frames": {"container": "avi", "bf": "2"},
    "ts": {"container": "mpegts", "codec": "libx264", "bf": "3"},
    "flv": {"container": "flv", "codec": "flv"},
    "wmv": {"container": "asf", "codec": "wmv2"},
    "mpeg": {"container": "mpeg", "codec": "mpeg2video"},
}


def in_order(data: bytes) -> tuple[list[float], list[NDArray[np.uint8]]]:
    """Every frame of a video, decoded one after the other: seconds from the first, pixels."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    start = min(frame.time for frame in frames)
    return [frame.time - start for frame in frames], [np.array(f.to_image()) for f in frames]


@pytest.mark.slow
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("frames", [1, 3, 8, 60])
def test_frames_are_those_shown_in_the_middle_of_equal_spans(clip: str, frames: int) -> None:
    data = av_video(50, **CLIPS[clip])
    times, pictures = in_order(data)
    assert len(times) == 50
    # 2 s in equal spans; frame n is shown from n / 25 s on.
    middles = [int((span + 0.5) / frames * 50 + 1e-6) for span in range(frames)]
    expected = sorted(set(middles))
    found = read_video(data, frames)
    assert len(found) == len(expected)
    for frame, index in zip(found, expected, strict=True):
        assert frame.seconds == pytest.approx(times[index], abs=1e-6)
        np.testing.assert_array_equal(np.array(frame.image), pictures[index])


@pytest.mark.parametrize("clip", ["mp4", "mkv"])
def test_a_tag_in_another_encoding_is_no_error(clip: str) -> None:
    data = av_video(10, **CLIPS[clip])
    assert b"Lavf" in data
    [frame] = read_video(data.replace(b"Lavf", b"\xe9\xe9vf"), 1)
    assert frame.image.size == (64, 48)


def turned(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An MP4 whose track is shown through another display matrix (16.16 fixed point)."""
    place = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 & 0xFFFFFFFF for value in matrix)
    x = 48 << 16 if b or c else 0
    new = struct.pack(">9I", a, b, 0, c, d, 0, x, 0, 1 << 30)
    return data[:place] + new + data[place + 36 :]


def test_rotation_is_honoured() -> None:
    """A telephone held upright stores its frames lying: the left of it is shown at the top."""
    data = av_video(10)
    [lying] = read_video(data, 1)
    [upright] = read_video(turned(data, (0, 1, -1, 0)), 1)
    assert lying.image.size == (64, 48)
    assert upright.image.size == (48, 64)
    # Clockwise by 90 degrees.
    expected = np.rot90(np.array(lying.image), -1)
    np.testing.assert_array_equal(np.array(upright.image), expected)
    [down] = read_video(turned(data, (-1, 0, 0, -1)), 1)
    np.testing.assert_array_equal(np.array(down.image), np.rot90(np.array(lying.image), 2))


def test_the_sound_of_a_video_is_read_as_audio() -> None:
    time = np.arange(32000) / 16000
    tone = (0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    data = av_video(50, sound=tone)
    clip = load_audio(data)
    assert clip.rate == 16000
    assert clip.seconds == pytest.approx(2.0, abs=0.1)
    assert np.abs(np.fft.rfft(clip.samples[8000:24000])).argmax() == 440


def test_the_log_level_of_the_process_stays_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    data = av_video(10)
    with pytest.raises(MediaError):
        read_video(data[: len(data) // 2], 1)
    assert capfd.readouterr() == ("", "")
    before = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        read_video(data, 1)
        assert av.logging.get_level() == av.logging.ERROR
    finally:
        av.logging.set_level(before)
