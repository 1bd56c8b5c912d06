"""Sounds and videos that the media tests make for themselves."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import soundfile  # type: ignore[import-untyped]
from numpy.typing import NDArray


def noise(seconds: float, rate: int = 16000, loud: float = 0.1) -> NDArray[np.float32]:
    """White noise `[samples]`, the same each time."""
    random = np.random.default_rng(1)
    return (loud * random.standard_normal(round(seconds * rate))).astype(np.float32)


def sound_file(samples: NDArray[Any], rate: int, kind: str = "WAV", **options: Any) -> bytes:
    """A file that libsndfile writes."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, **options)
    return file.getvalue()


def av_sound(
    samples: NDArray[np.float32], rate: int, container: str, codec: str, **options: str
) -> bytes:
    """A mono file that FFmpeg writes."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        stream.format = {"aac": "fltp", "libmp3lame": "s16p"}.get(codec, "s16")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return file.getvalue()


def av_video(
    frames: int = 50,
    container: str = "mp4",
    codec: str = "mpeg4",
    size: tuple[int, int] = (64, 48),
    sound: NDArray[np.float32] | None = None,
    **options: str,
) -> bytes:
    """A video of 25 frames a second, every frame of its own colours; left and right differ."""
    file = io.BytesIO()
    width, height = size
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = 12
        track = None if sound is None else output.add_stream("aac", rate=16000, layout="mono")
        for index in range(frames):
            pixels = np.full((height, width, 3), index * 5 % 256, np.uint8)
            pixels[:, : width // 2] = (index * 40 % 256, 0, 255 - index * 5 % 256)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
        if track is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 0
            output.mux(track.encode(frame))
            output.mux(track.encode(None))
    return file.getvalue()
