"""Sounds that end before the length they declare, and those whose recorder never declared one.

What is there is heard, sample for sample; what is missing is told, with both lengths.
"""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from phimlx.errors import MediaError
from phimlx.media.audio import load_audio
from phimlx.media.audio_file import open_audio
from phimlx.media.data_chunk import find_data_chunk
from phimlx.media.segments import split_audio
from tests.media.sounds import av_sound, av_video, noise, sound_file

RATE = 16000
SECONDS = 2.0
CUTS = (0.1, 0.33, 0.5, 0.77, 0.98)

# format, subtype, seconds that may be lost with a block that is not whole
FORMS = [
    ("WAV", "PCM_16", 0.0),
    ("WAV", "PCM_U8", 0.0),
    ("WAV", "FLOAT", 0.0),
    ("WAV", "ULAW", 0.0),
    ("WAV", "IMA_ADPCM", 0.2),
    ("WAV", "MS_ADPCM", 0.2),
    ("WAV", "GSM610", 0.1),
    ("WAVEX", "PCM_24", 0.0),
    ("RF64", "PCM_16", 0.0),
    ("W64", "PCM_16", 0.0),
    ("AIFF", "PCM_16", 0.0),
    ("AIFF", "FLOAT", 0.0),  # AIFC
    ("AIFF", "ALAW", 0.0),
    ("SVX", "PCM_16", 0.0),
    ("CAF", "PCM_16", 0.0),
    ("CAF", "ALAC_16", 0.5),
    ("AU", "PCM_16", 0.0),
    ("NIST", "PCM_16", 0.1),
    ("FLAC", "PCM_16", 0.6),
    ("MP3", "MPEG_LAYER_III", 0.3),
]


def heard(data: bytes) -> tuple[NDArray[np.float32], str | None]:
    """What can be read of a sound, and the error that ends it."""
    blocks: list[NDArray[np.float32]] = []
    try:
        with open_audio(data) as sound:
            for block in sound.blocks:
                blocks.append(block)
    except MediaError as error:
        return np.concatenate([*blocks, np.empty(0, np.float32)]), str(error)
    return np.concatenate(blocks), None


@pytest.mark.parametrize(("kind", "subtype", "lost"), FORMS)
@pytest.mark.parametrize("share", CUTS)
def test_what_is_there_is_heard_and_what_is_missing_told(
    kind: str, subtype: str, lost: float, share: float
) -> None:
    if (kind, share) == ("MP3", 0.98):
        pytest.skip("less than decoders differ by")
    data = sound_file(noise(SECONDS), RATE, kind, subtype=subtype)
    chunk = find_data_chunk(data)
    start = len(data) - chunk.present if chunk else 0
    whole, none = heard(data)
    assert none is None
    samples, error = heard(data[: start + round(share * (len(data) - start))])
    assert error is not None
    told = re.fullmatch(r"The data ends after ([\d.]+) s of ([\d.]+) s\.", error)
    assert told, error
    assert float(told[1]) == pytest.approx(share * SECONDS, abs=0.1 + lost)
    assert float(told[2]) == pytest.approx(SECONDS, abs=max(0.1, lost))
    if lost == 0.0:
        assert len(samples) == pytest.approx(share * len(whole), abs=100)
        np.testing.assert_array_equal(samples, whole[: len(samples)])


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("share", [0.2, 0.33, 0.5, 0.77, 0.98])
def test_an_ogg_that_breaks_off_tells_what_was_heard(subtype: str, share: float) -> None:
    """It declares no length, but marks its last page."""
    data = sound_file(noise(12.0), RATE, "OGG", subtype=subtype)
    assert heard(data)[1] is None
    samples, error = heard(data[: round(share * len(data))])
    assert error == f"The data ends after {len(samples) / RATE:.1f} s, before its own end."
    assert len(samples) / RATE == pytest.approx(share * 12.0, abs=1.5)


@pytest.mark.parametrize(("kind", "subtype", "lost"), FORMS)
def test_a_cut_sound_is_transcribed_as_far_as_it_goes(kind: str, subtype: str, lost: float) -> None:
    data = sound_file(noise(6.0), RATE, kind, subtype=subtype)
    pieces = split_audio(data[: len(data) // 2], segment_seconds=20)
    piece = next(pieces)
    assert piece.start == 0.0
    assert piece.end == pytest.approx(3.0, abs=0.2 + lost)
    with pytest.raises(MediaError, match=r"ends after [23]\.\d s of \d\.\d s\.$"):
        next(pieces)


def test_every_sample_before_the_cut_is_resampled() -> None:
    data = sound_file(noise(2.0, 44100), 44100)
    samples, error = heard(data[: 44 + 44100 * 2])
    assert error == "The data ends after 1.0 s of 2.0 s."
    assert len(samples) == RATE


def test_a_cut_sound_is_not_answered_about() -> None:
    data = sound_file(noise(2.0), RATE)
    with pytest.raises(MediaError) as error:
        load_audio(data[: len(data) // 2])
    assert str(error.value) == "The data ends after 1.0 s of 2.0 s."
    assert error.value.hint == "It may have been cut short: copy or download it again."


@pytest.mark.parametrize("kind", ["WAV", "RF64", "AIFF"])
def test_what_follows_the_samples_may_be_cut(kind: str) -> None:
    data = sound_file(noise(1.0), RATE, kind, subtype="PCM_16")
    form = ">I" if kind == "AIFF" else "<I"
    trailing = b"NAME" + struct.pack(form, 1000) + b"a title"
    samples, error = heard(data + trailing)
    assert (len(samples), error) == (RATE, None)


def test_a_header_a_few_bytes_off_is_no_cut() -> None:
    data = sound_file(noise(1.0), RATE)
    for more in (1, 2, 36, 44):
        wrong = data[:40] + struct.pack("<I", RATE * 2 + more) + data[44:]
        assert heard(wrong)[1] is None


def with_size(data: bytes, place: int, form: str, size: int) -> bytes:
    return data[:place] + struct.pack(form, size) + data[place + struct.calcsize(form) :]


# Sizes of the samples that stand for an unknown one: never written, of a pipe, of sox and arecord.
UNKNOWN_SIZES = (0, 0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFF000, 0x80000000)


def samples_of(seconds: float = 1.0) -> NDArray[np.float32]:
    return np.round(noise(seconds) * 32768) / np.float32(32768)


@pytest.mark.parametrize("before", [b"", b"FLLR", b"JUNK", b"LIST"])
@pytest.mark.parametrize("outer", [0, 8, 36, 4088, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("size", UNKNOWN_SIZES)
def test_a_wav_of_a_killed_recorder_is_read_to_its_end(
    size: int, outer: int, before: bytes
) -> None:
    data = sound_file(samples_of(), RATE)
    filler = before and before + struct.pack("<I", 4096 - 52) + bytes(4096 - 52)
    data = with_size(data, 4, "<I", outer)
    data = data[:36] + filler + b"data" + struct.pack("<I", size) + data[44:]
    samples, error = heard(data)
    assert error is None
    np.testing.assert_array_equal(samples, samples_of())


@pytest.mark.parametrize("silence", [0, 8, 4000, RATE])
def test_silence_at_the_beginning_is_no_chunk(silence: int) -> None:
    samples = samples_of()
    samples[:silence] = 0
    data = with_size(sound_file(samples, RATE), 40, "<I", 0)
    np.testing.assert_array_equal(heard(data)[0], samples)


@pytest.mark.parametrize(
    ("kind", "name", "form", "sizes"),
    [
        ("AIFF", b"SSND", ">I", (0, 8, 0xFFFFFFFF, 0x7FFFFFFF)),
        ("RF64", b"ds64", "<12xQ", (0, 2**64 - 1)),
        ("W64", b"data", "<12xq", (0, 24, -1, 2**63 - 1)),
        ("CAF", b"data", ">q", (-1, 0)),
        ("AU", b".snd", ">4xI", (0, 0xFFFFFFFF)),
    ],
)
def test_other_recorders_that_never_told_the_length(
    kind: str, name: bytes, form: str, sizes: tuple[int, ...]
) -> None:
    data = sound_file(samples_of(), RATE, kind, subtype="PCM_16")
    place = data.index(name) + 4 + struct.calcsize(form) - struct.calcsize(form[0] + form[-1])
    for size in sizes:
        samples, error = heard(with_size(data, place, form[0] + form[-1], size))
        assert error is None
        np.testing.assert_array_equal(samples, samples_of())


@pytest.mark.parametrize("trailing", [b"", b"LIST\x04\0\0\0INFO", b"id3 \x02\0\0\0ab" * 3])
def test_a_wav_that_holds_nothing_is_not_made_of_what_follows(trailing: bytes) -> None:
    data = with_size(sound_file(noise(1.0), RATE)[:44], 40, "<I", 0)
    with pytest.raises(MediaError, match=r"^The data holds no sound\.$"):
        load_audio(data + trailing)


def test_a_header_of_chunks_without_end_is_left_alone() -> None:
    data = b"RIFF\0\0\0\0WAVE" + b"junk\0\0\0\0" * 1_000_000
    assert find_data_chunk(data) is None


def index_first(data: bytes, path: Path) -> bytes:
    """An MP4 whose index stands before its sound."""
    with (
        av.open(io.BytesIO(data)) as source,
        av.open(path, "w", options={"movflags": "faststart"}) as output,
    ):
        stream = output.add_stream_from_template(source.streams[0])
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.2, 0.33, 0.5, 0.77, 0.97])
@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("mp4", "aac", RATE),
        ("mp4", "alac", RATE),
        ("webm", "libopus", 48000),
        ("matroska", "aac", 44100),
        ("flv", "aac", 44100),
        ("avi", "pcm_s16le", RATE),
        ("mpegts", "aac", RATE),
    ],
)
def test_a_container_cut_short_is_heard_as_far_as_it_goes(
    container: str, codec: str, rate: int, share: float, tmp_path: Path
) -> None:
    data = av_sound(noise(5.0, rate), rate, container, codec)
    data = index_first(data, tmp_path / "sound.mp4") if container == "mp4" else data
    whole, none = heard(data)
    assert none is None
    samples, error = heard(data[: round(share * len(data)) | 1])
    length = "before its own end" if container in ("avi", "mpegts") else "of 5.0 s"
    ended = len(samples) / RATE
    assert error is not None
    told = re.fullmatch(r"The data ends after ([\d.]+) s,? (.+)\.", error)
    assert told, error
    assert told[2] == length
    assert float(told[1]) == pytest.approx(ended, abs=0.11)
    assert ended == pytest.approx(share * 5.0, abs=0.4)
    same = min(len(samples) - 2000, len(whole))
    np.testing.assert_allclose(samples[:same], whole[:same], rtol=0, atol=1e-6)


@pytest.mark.parametrize("container", ["matroska", "mpegts", "avi"])
def test_a_sound_that_ends_before_its_video_is_whole(container: str) -> None:
    samples, error = heard(av_video(100, container, sound=noise(2.0)))
    assert error is None
    assert len(samples) / RATE == pytest.approx(2.0, abs=0.15)


def test_a_container_written_to_a_pipe_is_whole() -> None:
    """Its sizes and its length were never written."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    pipe = Pipe()
    with av.open(pipe, "w", format="webm", options={"live": "1"}) as output:
        stream = output.add_stream("libopus", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(noise(3.0, 48000)[None], format="flt", layout="mono")
        frame.sample_rate, frame.pts = 48000, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    samples, error = heard(pipe.getvalue())
    assert error is None
    assert len(samples) / RATE == pytest.approx(3.0, abs=0.1)
