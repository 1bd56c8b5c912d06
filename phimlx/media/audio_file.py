"""Audio files to blocks of mono samples at the model's rate: read, mixed, resampled as they go."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from phimlx.errors import MediaError
from phimlx.media.container import (
    HEADERS_TELL_LENGTH,
    ContainerFormat,
    declared_seconds,
    detect_container,
    is_cut_short,
    open_container,
    too_long,
)
from phimlx.media.data_chunk import find_data_chunk, is_open_ogg, sphere_samples
from phimlx.media.limits import Limits, source_name
from phimlx.media.log_mel import AudioClip, Samples
from phimlx.media.mp3 import xing_frame
from phimlx.media.source import BytesLike, read_bytes

# Samples `[samples]` or `[samples, channels]`, floats from -1 to 1 or integers, and their rate.
Recording = tuple[NDArray[Any], int]
AudioSource = str | Path | BytesLike | BinaryIO | Recording | AudioClip

BLOCK = 65536  # samples of each channel read at once
RATES = (1000, 768_000)  # Hz: below is no speech, above no recorder
MAX_CHANNELS = 64
# 36 dB over full scale: no float recording is that hot, but integers left unscaled are.
LOUDEST = 64.0
STEP = 4096  # samples asked of a decoder at once: what it loses where a file breaks off
# Headers differ from what is decoded by less than these; a file that ends earlier was cut short.
SLACK_SECONDS = 0.02
DECODER_SLACK_SECONDS = 0.2  # where encoders pad

# Forms of libsndfile whose files may be cut short anywhere without a word.
_UNCHECKED = ("SDS", "VOC", "AVR", "MPC2K", "MAT4", "MAT5", "WVE")
_SAMPLE_DUMP = b"\xf0\x7e"  # SDS
_UNKNOWN_LENGTH = 1 << 62  # what libsndfile counts in a file that does not say
_COPY_AGAIN = "It may have been cut short: copy or download it again."


@dataclass(frozen=True)
class AudioStream:
    """A sound being read: blocks of mono samples `[samples]` at 8 or 16 kHz.

    Attributes:
        seconds: how long it says that it is; None where it does not say.
    """

    rate: int
    blocks: Iterator[Samples]
    seconds: float | None


@dataclass(frozen=True)
class _RecordedAudio:
    """A sound as it was recorded; blocks `[samples, channels]` from -1 to 1."""

    name: str
    rate: int
    blocks: Iterator[NDArray[np.float32]]
    seconds: float | None


def model_rate(rate: int) -> int:
    """Return the rate, in Hz, at which the features of a sound are taken.

    8 kHz stays, on the path that the model was trained with. Everything above goes to 16 kHz:
    the original means 8 kHz for rates in between, though it leaves the samples as they are, and
    that would drop what they hold above 4 kHz. What is slower, which the original refuses, goes
    to 8 kHz.
    """
    return 8000 if rate <= 8000 else 16000


@contextmanager
def open_audio(source: AudioSource, limits: Limits | None = None) -> Iterator[AudioStream]:
    """Open a sound to read by blocks, mixed to one channel (their mean) and resampled (soxr HQ).

    What a file declares is checked before anything is decoded; decoding stops at the limits too.

    Raises:
        MediaError: the source cannot be had or read, is no sound, is damaged, cut short, or
            larger than the limits allow; some of it only when the block is asked for.
    """
    limits = limits or Limits()
    if isinstance(source, AudioClip):
        yield AudioStream(source.rate, iter([source.samples]), len(source.samples) / source.rate)
        return
    with _open_recorded(source, limits) as recorded:
        rate = model_rate(recorded.rate)
        blocks = resampled(_to_mono(recorded, limits), recorded.rate, rate)
        yield AudioStream(rate, blocks, recorded.seconds)


@contextmanager
def _open_recorded(source: Any, limits: Limits) -> Iterator[_RecordedAudio]:
    name = source_name(source)
    if isinstance(source, tuple):
        yield _from_samples(source, limits)
        return
    data = read_bytes(source, limits)
    form = detect_container(data)
    opened = (
        _open_soundfile(data, name, limits) if form is None else _open_av(data, form, name, limits)
    )
    with opened as recorded:
        yield recorded


def _from_samples(source: tuple[Any, Any], limits: Limits) -> _RecordedAudio:
    """Samples in memory: floats as they are, integers scaled as a file of that depth would be."""
    name = "The sound"
    if len(source) != 2 or not isinstance(source[1], int | np.integer):
        raise MediaError(
            "A sound in memory is samples and their rate.", hint="Give (samples, 16000)."
        )
    samples, rate = np.asarray(source[0]), int(source[1])
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fiu":
        raise MediaError(
            f"Samples are numbers [samples] or [samples, channels], "
            f"not {samples.dtype} {list(samples.shape)}.",
            hint="Give one array of floats from -1 to 1.",
        )
    if samples.ndim == 1:
        samples = samples[:, None]
    _check_format(name, rate, samples.shape[1])
    _check_length(name, len(samples), rate, limits)

    def blocks() -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(samples), BLOCK):
            yield _to_float32(samples[start : start + BLOCK])

    return _RecordedAudio(name, rate, blocks(), len(samples) / rate)


def _to_float32(samples: NDArray[Any]) -> NDArray[np.float32]:
    if samples.dtype.kind == "f":
        # A double past the range of a single becomes infinite, and is refused as such.
        with np.errstate(over="ignore"):
            return samples.astype(np.float32)
    half = 2.0 ** (8 * samples.dtype.itemsize - 1)
    zero = half if samples.dtype.kind == "u" else 0.0
    return ((samples.astype(np.float64) - zero) / half).astype(np.float32)


class _SeekableBytes(io.BytesIO):
    """Bytes that libsndfile may seek in; damaged ones send it before the first.

    `missing` bytes seem to lie behind the last: so long the file was before it was cut.
    """

    def __init__(self, data: bytes, missing: int = 0) -> None:
        super().__init__(data)
        self._length = len(data) + missing

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_END:
            return super().seek(self._length + offset)
        return super().seek(offset if whence else max(offset, 0), whence)


@contextmanager
def _open_soundfile(data: bytes, name: str, limits: Limits) -> Iterator[_RecordedAudio]:
    """Open what libsndfile reads. The format follows from the bytes alone, never from a name."""
    import soundfile  # type: ignore[import-untyped]

    class Forward(soundfile.SoundFile):  # type: ignore[misc]
        """Never seeks: after each block it otherwise would, and fails where no length is known."""

        def seekable(self) -> bool:
            return False

    if data.startswith(_SAMPLE_DUMP):  # of which libsndfile prints
        raise _unchecked(name)
    chunk = find_data_chunk(data)
    opening = xing_frame(data)
    bytes_read = _SeekableBytes(chunk.repaired(data) if chunk else opening + data)
    try:
        file = Forward(bytes_read)
    except soundfile.SoundFileError as error:
        if chunk and chunk.missing:
            raise MediaError(
                f"{name} was cut short, and cannot be read without its last "
                f"{chunk.missing:,} bytes.",
                hint=_COPY_AGAIN,
            ) from error
        raise MediaError(
            f"{name} is not a sound that can be read.",
            hint="wav, flac, mp3, ogg and aiff are; m4a and webm with the extra phimlx[video].",
        ) from error
    with file:
        if file.format in _UNCHECKED:
            raise _unchecked(name)
        _check_format(name, file.samplerate, file.channels)
        declared = None if opening or file.frames >= _UNKNOWN_LENGTH else file.frames
        if declared is not None:
            _check_length(name, declared, file.samplerate, limits)
            if chunk and chunk.missing:
                with Forward(_SeekableBytes(data, chunk.missing)) as uncut:
                    declared = uncut.frames
            declared = max(declared, sphere_samples(data) or 0)
        seconds = None if declared is None else declared / file.samplerate
        share = chunk.share if chunk else 1.0
        blocks = _soundfile_blocks(file, name, bytes_read, seconds, share, is_open_ogg(data))
        yield _RecordedAudio(name, file.samplerate, blocks, seconds)


def _soundfile_blocks(
    file: Any,
    name: str,
    bytes_read: BinaryIO,
    seconds: float | None,
    share: float,
    is_open: bool,
) -> Iterator[NDArray[np.float32]]:
    """Read what is there, then fail where that is not all.

    Args:
        seconds: how long it should be.
        share: how much of its bytes is there.
        is_open: whether its end is missing, however long it should be.
    """
    heard, failed = 0, False
    while not failed:
        steps, failed = _read_steps(file)
        if not steps:
            break
        heard += sum(map(len, steps))
        yield np.concatenate(steps)
    ended = heard / file.samplerate
    if failed and bytes_read.read(1):
        raise _damaged(name, ended)
    if is_open or seconds is None:
        if is_open or failed:
            raise _cut_short(name, ended, None)
        return
    ended = min(ended, seconds * share)  # a decoder may fill up what it has half of
    slack = DECODER_SLACK_SECONDS if file.format == "MP3" else SLACK_SECONDS
    if seconds - ended > slack:
        raise _cut_short(name, ended, seconds)


def _read_steps(file: Any) -> tuple[list[NDArray[np.float32]], bool]:
    """Read a block, step by step; true where the decoder failed behind it."""
    import soundfile  # type: ignore[import-untyped]

    steps: list[NDArray[np.float32]] = []
    for _ in range(BLOCK // STEP):
        try:
            step = file.read(STEP, dtype="float32", always_2d=True)
        except soundfile.SoundFileError:
            return steps, True
        if not len(step):
            break
        steps.append(step)
    return steps, False


@contextmanager
def _open_av(
    data: bytes, form: ContainerFormat, name: str, limits: Limits
) -> Iterator[_RecordedAudio]:
    with open_container(data, form, name) as container:
        if not container.streams.audio:
            raise MediaError(f"{name} holds no sound.", hint="Give a file with an audio track.")
        stream = container.streams.audio[0]
        declared = declared_seconds(container, stream)
        if declared is not None and declared > limits.max_seconds:
            raise too_long(name, limits)
        told = declared if form.demuxer in HEADERS_TELL_LENGTH else None
        blocks = _av_blocks(container, stream, name, told, is_cut_short(data, form))
        # The decoder alone knows the rate: AAC may declare half of it.
        first = next(blocks, None)
        if first is None:
            raise _no_sound(name)
        every = (block for _, block in itertools.chain([first], blocks))
        yield _RecordedAudio(name, first[0], every, declared)


def _av_blocks(
    container: Any, stream: Any, name: str, seconds: float | None, is_cut: bool
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Decode what is there, then fail where that is not all; the rate, and `[samples, channels]`.

    Args:
        seconds: how long it should be.
        is_cut: whether bytes of its end are missing.
    """
    import av

    resampler = av.AudioResampler(format="fltp")
    shape: tuple[int, int] | None = None
    ended = 0.0
    try:
        for frame in container.decode(stream):
            if shape is None:
                shape = frame.sample_rate, frame.layout.nb_channels
                _check_format(name, *shape)
            elif shape != (frame.sample_rate, frame.layout.nb_channels):
                raise MediaError(
                    f"{name} changes its rate or channels in the middle.",
                    hint="Convert it to wav or flac first.",
                )
            ended += frame.samples / frame.sample_rate
            for plane in resampler.resample(frame):
                yield shape[0], plane.to_ndarray().T.astype(np.float32)  # [samples, channels]
    except av.FFmpegError as error:
        if isinstance(error, MemoryError) or not (ended or is_cut):
            raise
        if not is_cut:
            raise _damaged(name, ended) from error
    if is_cut and (seconds is None or seconds - ended > SLACK_SECONDS):
        raise _cut_short(name, ended, seconds)


def _check_format(name: str, rate: int, channels: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise MediaError(
            f"{name} has {rate} samples a second; {RATES[0]} to {RATES[1]} can be read.",
            hint="Check its sampling rate.",
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise MediaError(
            f"{name} has {channels} channels; 1 to {MAX_CHANNELS} can be read.",
            hint="Mix it down to one channel.",
        )


def _check_length(name: str, samples: int, rate: int, limits: Limits) -> None:
    if samples > limits.max_seconds * rate:
        raise too_long(name, limits)


def _damaged(name: str, ended: float) -> MediaError:
    return MediaError(f"{name} is damaged somewhere after {ended:.1f} s.", hint=_COPY_AGAIN)


def _cut_short(name: str, ended: float, seconds: float | None) -> MediaError:
    """Make the error of a sound that ends before the length it declares; None where it has none."""
    whole = ", before its own end" if seconds is None else f" of {seconds:.1f} s"
    return MediaError(f"{name} ends after {ended:.1f} s{whole}.", hint=_COPY_AGAIN)


def _unchecked(name: str) -> MediaError:
    return MediaError(
        f"{name} is a sound in a form of which nothing tells whether it is whole.",
        hint="Convert it to wav or flac first, with the program that it came from.",
    )


def _no_sound(name: str) -> MediaError:
    return MediaError(f"{name} holds no sound.", hint="It has a header, and nothing after it.")


def _to_mono(recorded: _RecordedAudio, limits: Limits) -> Iterator[Samples]:
    """The mean of the channels, of samples that are sound, as long as the limits allow."""
    heard = 0
    for block in recorded.blocks:
        heard += len(block)
        _check_length(recorded.name, heard, recorded.rate, limits)
        peak = float(np.abs(block).max(initial=0.0))
        if not peak <= LOUDEST:
            if not np.isfinite(peak):
                raise MediaError(
                    f"{recorded.name} holds samples that are not finite numbers.",
                    hint="It was written by a faulty program: export it again.",
                )
            raise MediaError(
                f"{recorded.name} reaches {peak:.3g}; sound runs from -1 to 1.",
                hint="Divide 16-bit samples by 32768, or give them as integers.",
            )
        if block.shape[1] == 1:
            yield np.ascontiguousarray(block[:, 0])
        else:
            yield block.mean(axis=1, dtype=np.float64).astype(np.float32)
    if not heard:
        raise _no_sound(recorded.name)


def resampled(blocks: Iterable[Samples], rate: int, target: int) -> Iterator[Samples]:
    """Resample block by block (soxr HQ): the same numbers as all at once."""
    if rate == target:
        yield from blocks
        return
    import soxr  # type: ignore[import-untyped]

    stream = soxr.ResampleStream(rate, target, 1, dtype="float32", quality="HQ")
    try:
        for block in blocks:
            yield stream.resample_chunk(block)
    except MediaError:
        yield stream.resample_chunk(np.empty(0, np.float32), last=True)
        raise
    yield stream.resample_chunk(np.empty(0, np.float32), last=True)
