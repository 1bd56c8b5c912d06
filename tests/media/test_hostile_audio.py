"""Sounds and videos that lie, break off or are none: refused in one sentence, before they cost.

Each file is made here, and each refusal has its words and its next step.
"""

from __future__ import annotations

import io
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from phimlx.errors import MediaError
from phimlx.media import video
from phimlx.media.audio import load_audio, prepare_audio
from phimlx.media.limits import Limits
from phimlx.media.video import read_video
from tests.media.sounds import av_sound, av_video, noise, sound_file

RATE = 16000


def wav(
    rate: int = RATE,
    channels: int = 1,
    bits: int = 16,
    codec: int = 1,
    data: bytes = bytes(8000),
    size: int | None = None,
) -> bytes:
    """A WAV of which the header says what it is told to."""
    size = len(data) if size is None else size
    width = channels * bits // 8
    form = struct.pack(
        "<IHHIIHH", 16, codec, channels, rate, rate * width & 0xFFFFFFFF, width & 0xFFFF, bits
    )
    riff = struct.pack("<I", min(36 + size, 0xFFFFFFFF))
    return b"RIFF" + riff + b"WAVEfmt " + form + b"data" + struct.pack("<I", size) + data


def floats(value: float, subtype: str = "FLOAT") -> bytes:
    samples = np.zeros(RATE)
    samples[RATE // 2] = value
    return sound_file(samples, RATE, subtype=subtype)


def flac(samples: int | None = None) -> bytes:
    """Five seconds of FLAC whose header claims that many samples (36 bits)."""
    data = bytearray(sound_file(noise(5), RATE, "FLAC"))
    if samples is not None:
        fields = int.from_bytes(data[18:26], "big")
        data[18:26] = (fields & ~((1 << 36) - 1) | samples).to_bytes(8, "big")
    return bytes(data)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def tone_m4a() -> bytes:
    return av_sound(noise(5), RATE, "mp4", "aac")


def blanked(data: bytes) -> bytes:
    """An MP4 with nothing but zeros where its frames were."""
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    return data[:start] + bytes(end - start) + data[end:]


def stretched(data: bytes) -> bytes:
    """A WebM or Matroska whose header says that it lasts 40 days."""
    place = data.index(b"\x44\x89\x88") + 3
    return data[:place] + struct.pack(">d", 40 * 86400e3) + data[place + 8 :]


NO_SOUND = (
    "The data is not a sound that can be read.",
    "wav, flac, mp3, ogg and aiff are; m4a and webm with the extra phimlx[video].",
)
EMPTY = "The data holds no sound."
EMPTY_HINT = "It has a header, and nothing after it."
LONG = ("The data is longer than 14400 s.", "If you trust it, raise the limit with --max-seconds.")
CUT = "It may have been cut short: copy or download it again."
PLAYS = "Check that it plays elsewhere; a copy that was cut short cannot be read."
FAULTY = (
    "The data holds samples that are not finite numbers.",
    "It was written by a faulty program: export it again.",
)


def unreadable(
    kind: str, reason: str = "Invalid data found when processing input"
) -> tuple[str, str]:
    return f"The data is not readable {kind}: {reason}.", PLAYS


# name: the file, the message, the next step
HOSTILE: dict[str, tuple[Callable[[], bytes], tuple[str, str | None]]] = {
    "empty": (lambda: b"", ("The data is empty.", None)),
    "text": (lambda: b"hello " * 1000, NO_SOUND),
    "picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), NO_SOUND),
    "archive": (lambda: b"PK\x03\x04" + bytes(100), NO_SOUND),
    "playlist": (lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", NO_SOUND),
    "concat list": (lambda: b"ffconcat version 1.0\nfile '/etc/passwd'\n", NO_SOUND),
    "matlab": (lambda: b"MATLAB 5.0 MAT-file" + bytes(200), NO_SOUND),
    "wav rate 0": (lambda: wav(rate=0), NO_SOUND),
    "wav rate 1e9": (
        lambda: wav(rate=10**9),
        (
            "The data has 1000000000 samples a second; 1000 to 768000 can be read.",
            "Check its sampling rate.",
        ),
    ),
    "wav rate 4e9": (lambda: wav(rate=4 * 10**9), NO_SOUND),
    "wav rate 100": (
        lambda: wav(rate=100),
        (
            "The data has 100 samples a second; 1000 to 768000 can be read.",
            "Check its sampling rate.",
        ),
    ),
    "wav 0 channels": (lambda: wav(channels=0), NO_SOUND),
    "wav 1000 channels": (
        lambda: wav(channels=1000),
        ("The data has 1000 channels; 1 to 64 can be read.", "Mix it down to one channel."),
    ),
    "wav 65535 channels": (lambda: wav(channels=65535), NO_SOUND),
    "wav of 0 bits": (lambda: wav(bits=0), NO_SOUND),
    "wav of an unknown codec": (lambda: wav(codec=99), NO_SOUND),
    "wav without samples": (lambda: wav(data=b""), (EMPTY, EMPTY_HINT)),
    "wav cut in its header": (lambda: wav()[:20], NO_SOUND),
    "wav with a NaN": (lambda: floats(np.nan), FAULTY),
    "wav with an infinity": (lambda: floats(-np.inf), FAULTY),
    "wav past single precision": (lambda: floats(1e300, "DOUBLE"), FAULTY),
    "wav of 1e30": (
        lambda: floats(1e30),
        (
            "The data reaches 1e+30; sound runs from -1 to 1.",
            "Divide 16-bit samples by 32768, or give them as integers.",
        ),
    ),
    "flac of 49 days": (lambda: flac((1 << 36) - 1), LONG),
    "flac of 40 hours": (lambda: flac(RATE * 3600 * 40), LONG),
    "flac cut in half": (
        lambda: half(flac()),
        ("The data ends after 2.3 s of 5.0 s.", CUT),
    ),
    "flac of zeros": (lambda: b"fLaC" + bytes(40), NO_SOUND),
    "mp3 cut in half": (
        lambda: half(sound_file(noise(5), RATE, "MP3")),
        ("The data ends after 2.4 s of 5.0 s.", CUT),
    ),
    "mp3 cut at once": (lambda: sound_file(noise(5), RATE, "MP3")[:50], NO_SOUND),
    "mp3 tag without end": (lambda: b"ID3\3\0\0\x7f\x7f\x7f\x7f" + bytes(100), NO_SOUND),
    "ogg cut in its header": (lambda: sound_file(noise(5), RATE, "OGG")[:100], NO_SOUND),
    "ogg of zeros": (lambda: b"OggS" + bytes(1000), NO_SOUND),
    "au of 2 GHz": (
        lambda: b".snd" + struct.pack(">5I", 24, 2**32 - 1, 3, 2**31 - 1, 1) + bytes(1000),
        (
            "The data has 2147483647 samples a second; 1000 to 768000 can be read.",
            "Check its sampling rate.",
        ),
    ),
    "m4a cut in half": (lambda: half(tone_m4a()), unreadable("MP4 or M4A")),
    "webm of 40 days": (
        lambda: stretched(av_sound(noise(5, 48000), 48000, "webm", "libopus")),
        LONG,
    ),
    "m4a of zeros": (lambda: b"\0\0\0\x18ftypM4A " + bytes(1000), unreadable("MP4 or M4A")),
    "m4a without sound": (
        lambda: av_video(5),
        (EMPTY, "Give a file with an audio track."),
    ),
    "webm of zeros": (lambda: b"\x1a\x45\xdf\xa3" + bytes(1000), unreadable("WebM or Matroska")),
    "aac of zeros": (lambda: b"\xff\xf1" + bytes(1000), (EMPTY, EMPTY_HINT)),
    "aac that changes its rate": (
        lambda: (
            av_sound(noise(1), RATE, "adts", "aac")
            + av_sound(noise(1, 44100), 44100, "adts", "aac")
        ),
        (
            "The data changes its rate or channels in the middle.",
            "Convert it to wav or flac first.",
        ),
    ),
    "avi of zeros": (lambda: b"RIFF\x10\0\0\0AVI " + bytes(100), unreadable("AVI")),
    "wmv of zeros": (
        lambda: bytes.fromhex("3026b2758e66cf11") + bytes(1000),
        unreadable("WMA or WMV"),
    ),
    "amr of zeros": (
        lambda: b"#!AMR\n" + bytes(100),
        ("The data is damaged somewhere after 0.1 s.", CUT),
    ),
    "flv of zeros": (lambda: b"FLV\x01\x04" + bytes(200), unreadable("FLV", "End of file")),
}


def refusal(call: Callable[[], Any]) -> tuple[str, str | None]:
    with pytest.raises(MediaError) as error:
        call()
    return str(error.value), error.value.hint


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_sound_is_refused(name: str) -> None:
    make, expected = HOSTILE[name]
    data = make()
    assert refusal(lambda: load_audio(data)) == expected


def test_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.wav"
    path.write_text("not a sound")
    assert refusal(lambda: load_audio(path)) == (
        f"{path} is not a sound that can be read.",
        NO_SOUND[1],
    )


def test_missing_file_and_folder(tmp_path: Path) -> None:
    gone = tmp_path / "gone.wav"
    assert refusal(lambda: load_audio(gone)) == (f"There is no file {gone}.", "Check the path.")
    assert refusal(lambda: load_audio(tmp_path)) == (f"{tmp_path} is a folder.", "Name a file.")


def test_a_file_past_the_size_limit() -> None:
    limits = Limits(max_bytes=1000)
    message, hint = refusal(lambda: load_audio(wav(), limits))
    assert message == "The data is larger than 1.00 kB."
    assert hint == "If you trust it, raise the limit with --max-bytes."


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_longer_than_the_limit(kind: str) -> None:
    data = sound_file(noise(3), RATE, kind)
    expected = ("The data is longer than 2.5 s.", LONG[1])
    assert refusal(lambda: load_audio(data, Limits(max_seconds=2.5))) == expected
    assert load_audio(data, Limits(max_seconds=3.5)).seconds == 3.0


def test_length_that_no_header_tells_is_counted() -> None:
    data = flac(0)
    assert load_audio(data).seconds == 5.0
    expected = ("The data is longer than 4 s.", LONG[1])
    assert refusal(lambda: load_audio(data, Limits(max_seconds=4))) == expected
    without = av_sound(noise(3), RATE, "mp3", "libmp3lame", write_xing="0", id3v2_version="0")
    assert b"Info" not in without
    assert load_audio(without).seconds == pytest.approx(3.0, abs=0.2)
    expected = ("The data is longer than 2.5 s.", LONG[1])
    assert refusal(lambda: load_audio(without, Limits(max_seconds=2.5))) == expected


def test_mp4_cut_short_behind_its_index(tmp_path: Path) -> None:
    path = tmp_path / "tone.mp4"
    with (
        av.open(io.BytesIO(tone_m4a())) as source,
        av.open(path, "w", options={"movflags": "faststart"}) as output,
    ):
        stream = output.add_stream_from_template(source.streams[0])
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    load_audio(data)
    assert refusal(lambda: load_audio(half(data))) == ("The data ends after 2.4 s of 5.0 s.", CUT)


def test_streamed_header_of_4_gb_reads_what_is_there() -> None:
    data = wav(size=0xFFFFFFFF)
    load_audio(data)
    tracemalloc.start()
    assert load_audio(data).seconds == 0.25
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_shorter_than_one_window() -> None:
    data = wav(data=bytes(2 * 399))
    assert refusal(lambda: prepare_audio([data])) == (
        "A sound of 24.9 ms is too short to be heard.",
        "Phi-4 hears in windows of 25 ms: give it at least one.",
    )
    assert prepare_audio([wav(data=bytes(2 * 400))]).tokens == [1]


def test_silence_is_a_sound() -> None:
    audio = prepare_audio([wav()])
    assert audio.tokens == [3]
    assert not audio.input_audio_embeds.any()


SHAPE = "Give one array of floats from -1 to 1."


@pytest.mark.parametrize(
    ("samples", "rate", "expected"),
    [
        (
            np.zeros((2, 2, 2), np.float32),
            RATE,
            ("Samples are numbers [samples] or [samples, channels], not float32 [2, 2, 2].", SHAPE),
        ),
        (
            np.zeros(1000, np.complex64),
            RATE,
            ("Samples are numbers [samples] or [samples, channels], not complex64 [1000].", SHAPE),
        ),
        (
            np.float32(1),
            RATE,
            ("Samples are numbers [samples] or [samples, channels], not float32 [].", SHAPE),
        ),
        (np.zeros(0, np.float32), RATE, ("The sound holds no sound.", EMPTY_HINT)),
        (
            np.zeros((1000, 0), np.float32),
            RATE,
            ("The sound has 0 channels; 1 to 64 can be read.", "Mix it down to one channel."),
        ),
        (
            np.zeros((2, 16000), np.float32),
            RATE,
            ("The sound has 16000 channels; 1 to 64 can be read.", "Mix it down to one channel."),
        ),
        (
            np.zeros(1000, np.float32),
            0,
            (
                "The sound has 0 samples a second; 1000 to 768000 can be read.",
                "Check its sampling rate.",
            ),
        ),
        (
            np.zeros(1000, np.float32),
            "16000",
            ("A sound in memory is samples and their rate.", "Give (samples, 16000)."),
        ),
        (
            np.broadcast_to(np.float32(0), 10**12),
            RATE,
            ("The sound is longer than 14400 s.", LONG[1]),
        ),
        (
            np.full(1000, 20000.0),
            RATE,
            (
                "The sound reaches 2e+04; sound runs from -1 to 1.",
                "Divide 16-bit samples by 32768, or give them as integers.",
            ),
        ),
    ],
)
def test_hostile_samples(samples: NDArray[Any], rate: Any, expected: tuple[str, str]) -> None:
    assert refusal(lambda: load_audio((samples, rate))) == expected


def test_nothing_given() -> None:
    assert refusal(lambda: prepare_audio([])) == ("No sound was given.", "Give at least one.")


def test_without_pyav_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "talk.m4a"
    path.write_bytes(tone_m4a())
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(av_video(5))
    monkeypatch.setitem(sys.modules, "av", None)
    hint = "Install it with: pip install 'phimlx[video]'"
    message = "is MP4 or M4A, which needs PyAV, and that is not installed."
    assert refusal(lambda: load_audio(path)) == (f"{path} {message}", hint)
    assert refusal(lambda: read_video(clip, 4)) == (f"{clip} {message}", hint)
    # Everything else is read without.
    assert load_audio(wav()).seconds == 0.25


NO_VIDEO = (
    "The data is not a video that can be read.",
    "mp4, mov, webm, mkv, avi, wmv, flv and mpeg are.",
)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: b"hello " * 100, NO_VIDEO),
        (lambda: b"#EXTM3U\nfile:///etc/passwd\n", NO_VIDEO),
        (lambda: wav(), NO_VIDEO),
        (lambda: half(av_video(20)), unreadable("MP4 or M4A")),
        (lambda: tone_m4a(), ("The data holds no pictures.", "Give a sound with --audio instead.")),
        (lambda: stretched(av_video(20, "webm", "libvpx-vp9")), LONG),
        (lambda: b"\x1a\x45\xdf\xa3" + bytes(500), unreadable("WebM or Matroska")),
        (lambda: blanked(av_video(20)), unreadable("MP4 or M4A")),
        (
            lambda: blanked(av_video(20, codec="libx264")),
            ("The data holds no pictures.", "It may have been cut short."),
        ),
    ],
    ids=["text", "playlist", "sound", "half", "sound in mp4", "days", "zeros", "blank", "empty"],
)
def test_hostile_video(make: Callable[[], bytes], expected: tuple[str, str]) -> None:
    data = make()
    assert refusal(lambda: read_video(data, 4)) == expected


def test_video_past_the_limits() -> None:
    data = av_video(50)
    assert refusal(lambda: read_video(data, 4, Limits(max_pixels=3000))) == (
        "The data has frames of 64 × 48 pixels; at most 3000 are read.",
        "If you trust it, raise the limit with --max-pixels.",
    )
    assert refusal(lambda: read_video(data, 4, Limits(max_seconds=1.5))) == (
        "The data is longer than 1.5 s.",
        LONG[1],
    )
    assert refusal(lambda: read_video(data, 9, Limits(max_frames=8))) == (
        "9 frames of one video were asked for; 1 to 8 can be had.",
        "If you trust it, raise the limit with --max-frames.",
    )
    assert refusal(lambda: read_video(data, 0)) == (
        "0 frames of one video were asked for; 1 to 64 can be had.",
        "Ask for at least one.",
    )


def test_video_of_more_frames_than_any_has(monkeypatch: pytest.MonkeyPatch) -> None:
    data = av_video(20)
    monkeypatch.setattr(video, "MAX_PACKETS", 19)
    assert refusal(lambda: read_video(data, 4)) == (
        "The data has more than 19 frames.",
        "Cut it into shorter videos.",
    )


def test_video_of_which_nothing_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = av_video(20)
    monkeypatch.setattr(video, "_decoded", lambda *_: iter(()))
    message, hint = refusal(lambda: read_video(data, 4))
    assert message == "The data is damaged: none of its frames can be decoded."
    assert hint == "Copy or download it again."


NO_MEMORY = (
    "The data needs more memory than there is.",
    "Close other programs, or give a smaller file.",
)


def test_memory_that_runs_out_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    sound, clip = tone_m4a(), av_video(5)

    def exhausted(*_: object, **__: object) -> None:
        raise av.error.MemoryError(12, "Cannot allocate memory")

    monkeypatch.setattr(av, "open", exhausted)
    assert refusal(lambda: load_audio(sound)) == NO_MEMORY
    assert refusal(lambda: read_video(clip, 4)) == NO_MEMORY
