"""Where somebody speaks, told while it is spoken."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
from numpy.typing import NDArray

from phimlx.errors import MediaError
from phimlx.hub.resolve import NANO_MULTIMODAL
from phimlx.media.audio_file import AudioStream
from phimlx.media.segments import Segment
from phimlx.media.speech import SpeechDetector, split_live
from tests.media.microphones import recording

RATE = 16_000
CLIPS = sorted((NANO_MULTIMODAL / "clips").glob("speech-*"))


def pieces(
    samples: NDArray[np.float32], longest: float = 30.0, block: int = 800, rate: int = RATE
) -> list[Segment]:
    blocks = (samples[start : start + block] for start in range(0, len(samples), block))
    return list(split_live(AudioStream(rate, iter(blocks), None), longest))


def times(found: list[Segment]) -> list[tuple[float, float]]:
    return [(round(each.start, 2), round(each.end, 2)) for each in found]


@pytest.mark.parametrize("block", [100, 160, 800, 1000])
@pytest.mark.parametrize("rate", [8000, RATE])
def test_a_pause_ends_a_piece(block: int, rate: int) -> None:
    samples = recording(1.0, 2.0, 1.5, 1.0, 3.0, rate=rate)
    found = pieces(samples, block=block, rate=rate)
    assert times(found) == [(0.75, 3.25), (4.25, 5.75)]
    for each in found:
        first = round(each.start * rate)
        assert np.array_equal(each.samples, samples[first : first + len(each.samples)])


def test_pieces_come_while_it_is_spoken() -> None:
    samples = recording(0.5, 2.0, 1.5, 2.0, 1.5)
    read = 0

    def blocks() -> Iterator[NDArray[np.float32]]:
        nonlocal read
        for start in range(0, len(samples), 800):
            read = start + 800
            yield samples[start:read]

    found = split_live(AudioStream(RATE, blocks(), None), 30.0)
    next(found)
    assert read / RATE == pytest.approx(2.5 + 0.8, abs=0.1)
    next(found)
    assert read / RATE == pytest.approx(6.0 + 0.8, abs=0.1)


def test_the_longer_it_goes_on_the_sooner_a_pause_ends_it() -> None:
    assert times(pieces(recording(0.5, 2.0, 0.5, 2.0, 0.5, 4.0, 0.5, 1.0))) == [
        (0.25, 9.65),
        (9.75, 11.0),
    ]


def test_who_never_pauses_is_cut_where_it_is_quietest() -> None:
    samples = recording(0.5, 25.0)
    samples[RATE * 9 : RATE * 9 + 1600] *= 0.1
    found = pieces(samples, 10.0)
    assert len(found) == 3
    assert found[0].end == pytest.approx(9.05, abs=0.06)
    assert [found[0].end, found[1].end] == pytest.approx([found[1].start, found[2].start])
    assert found[-1].end == 25.5


def test_a_background_is_not_speech() -> None:
    assert pieces(recording(10.0)) == []
    assert pieces(recording(20.0, hum=5e-3)) == []
    assert pieces(np.zeros(10 * RATE, np.float32)) == []
    click = recording(2.0, 0.05, 3.0)
    assert pieces(click) == []


def test_real_speech_over_a_hum_comes_whole() -> None:
    hum = recording(1.5)
    clips = [soundfile.read(clip, dtype="float32")[0] for clip in CLIPS]
    found = pieces(np.concatenate([hum, *(part for clip in clips for part in (clip, hum))]))
    assert len(found) == len(clips)
    for each, clip in zip(found, clips, strict=True):
        energy = float(np.square(each.samples).sum())
        assert energy == pytest.approx(float(np.square(clip).sum()), rel=1e-2)


def test_who_speaks_at_once_is_heard() -> None:
    speech = soundfile.read(CLIPS[0], dtype="float32")[0]
    detector = SpeechDetector(RATE)
    told = detector.add(speech)
    assert told[:50].any()
    (found,) = pieces(np.concatenate((speech, recording(2.0))))
    assert found.start < 0.3


def test_a_sound_that_breaks_off_is_understood_first() -> None:
    def blocks() -> Iterator[NDArray[np.float32]]:
        yield recording(0.5, 1.0)
        raise MediaError("The microphone is gone: it sends no more sound.")

    found = split_live(AudioStream(RATE, blocks(), None), 30.0)
    assert next(found).end == 1.5
    with pytest.raises(MediaError):
        next(found)


def test_pieces_no_model_hears_are_refused() -> None:
    with pytest.raises(MediaError, match=r"^Pieces of 60 s cannot be transcribed\.$"):
        pieces(recording(1.0), 60.0)
