"""Recordings in pieces: short enough, in order, apart, and without a word lost."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from phimlx.errors import MediaError
from phimlx.media.audio import load_audio
from phimlx.media.limits import Limits
from phimlx.media.log_mel import AudioClip
from phimlx.media.segments import SILENCE, STEP, TRAINED_SECONDS, Segment, split_audio
from tests.bundled import present
from tests.media.sounds import noise, sound_file

RATE = 8000


def recording(*parts: tuple[float, float], rate: int = RATE) -> NDArray[np.float32]:
    """Noise by (seconds, loudness)."""
    return np.concatenate([noise(seconds, rate, loud) for seconds, loud in parts])


def cut(
    samples: NDArray[np.float32], rate: int, segment_seconds: float = TRAINED_SECONDS
) -> list[Segment]:
    """The pieces of samples that are read as one block."""
    return list(split_audio(AudioClip(samples, rate), segment_seconds=segment_seconds))


def spans(pieces: list[Segment]) -> list[tuple[float, float]]:
    return [(round(piece.start, 2), round(piece.end, 2)) for piece in pieces]


def check(pieces: list[Segment], samples: NDArray[np.float32], rate: int, longest: float) -> None:
    """Ordered, disjoint, within the longest, exact copies, and all that sounds is in one."""
    heard = np.zeros(len(samples), bool)
    for piece in pieces:
        start, end = round(piece.start * rate), round(piece.end * rate)
        assert 0 <= start < end <= len(samples)
        assert end - start <= longest * rate
        np.testing.assert_array_equal(piece.samples, samples[start:end])
        heard[start:end] = True
    assert all(first.end <= second.start for first, second in pairwise(pieces))
    step = round(STEP * rate)
    for start in range(0, len(samples), step):
        moment = samples[start : start + step].astype(np.float64)
        if np.mean(moment**2) > SILENCE:
            assert heard[start : start + step].all(), start / rate


def test_what_fits_stays_whole() -> None:
    samples = recording((3, 0), (10, 0.1), (5, 0))
    [piece] = cut(samples, RATE, 20)
    assert (piece.start, piece.end) == (0.0, 18.0)
    np.testing.assert_array_equal(piece.clip.samples, samples)


def test_cuts_in_the_middle_of_the_longest_pause() -> None:
    samples = recording(
        (12, 0.1), (0.4, 1e-4), (3, 0.1), (0.8, 1e-4), (2, 0.1), (0.3, 1e-4), (9, 0.1)
    )
    assert spans(cut(samples, RATE, 20)) == [(0.0, 15.8), (15.8, 27.5)]


def test_a_pause_in_the_first_half_is_better_than_none() -> None:
    samples = recording((5, 0.1), (0.5, 1e-4), (20, 0.1))
    assert spans(cut(samples, RATE, 20))[0] == (0.0, 5.25)


def test_background_noise_is_no_speech() -> None:
    # A pause 26 dB quieter than the voice, in a recording that is never silent.
    samples = recording((15, 0.2), (0.5, 0.01), (15, 0.2))
    assert spans(cut(samples, RATE, 20)) == [(0.0, 15.25), (15.25, 30.5)]


def test_without_a_pause_cuts_where_it_is_quietest() -> None:
    samples = recording((17, 0.1), (0.05, 0.02), (10, 0.1))
    [(start, end), (again, last)] = spans(cut(samples, RATE, 20))
    assert (start, last) == (0.0, 27.05)
    assert 17.0 <= end == again <= 17.05


def test_silence_between_pieces_is_left_out() -> None:
    samples = recording((15, 0.1), (60, 0), (10, 0.1))
    # A quarter of a second stays at each side.
    assert spans(cut(samples, RATE, 20)) == [(0.0, 15.25), (74.75, 85.0)]


def test_silence_alone_has_no_pieces() -> None:
    assert cut(np.zeros(100 * RATE, np.float32), RATE, 20) == []
    assert cut(np.zeros(RATE, np.float32), RATE, 20) == []
    assert cut(np.zeros(0, np.float32), RATE, 20) == []


def test_no_scrap_is_left_at_the_end() -> None:
    pieces = cut(noise(40.01, RATE), RATE, 40)
    assert len(pieces) == 2
    assert min(len(piece.samples) for piece in pieces) >= RATE / 4


@pytest.mark.parametrize("seconds", [0.0, 0.5, 40.1, 3600.0, float("nan")])
def test_pieces_longer_than_trained_are_refused(seconds: float) -> None:
    with pytest.raises(MediaError) as error:
        cut(noise(1.0), 16000, seconds)
    assert str(error.value) == f"Pieces of {seconds:g} s cannot be transcribed."
    assert error.value.hint == "Phi-4 was trained on 1 to 40 s."


PARTS = st.lists(
    st.tuples(st.floats(0.004, 4), st.sampled_from([0.0, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5])),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(PARTS, st.floats(1, 9), st.sampled_from([8000, 16000]))
def test_pieces_lose_and_repeat_nothing(
    parts: list[tuple[float, float]], longest: float, rate: int
) -> None:
    samples = recording(*parts, rate=rate)
    check(cut(samples, rate, longest), samples, rate, longest)


@settings(max_examples=30, deadline=None)
@given(PARTS, st.floats(1, 9))
def test_reading_in_blocks_gives_the_same_pieces(
    parts: list[tuple[float, float]], longest: float
) -> None:
    samples = recording((1, 0.1), *parts)
    whole = cut(samples, RATE, longest)
    assert spans(list(split_audio((samples, RATE), segment_seconds=longest))) == spans(whole)


def test_speech_is_cut_between_words(data: Path) -> None:
    clip = load_audio(present(data / "audio" / "jfk_16k.wav"))
    samples = np.concatenate([clip.samples] * 6)
    pieces = cut(samples, clip.rate)
    check(pieces, samples, clip.rate, 40)
    assert len(pieces) == 2
    # Within 0.1 s of each cut it is 20 dB quieter than speech is.
    speech = np.percentile(np.square(samples).reshape(-1, 160).mean(1), 95)
    for piece in pieces[:-1]:
        end = round(piece.end * clip.rate)
        assert np.mean(np.square(samples[end - 1600 : end + 1600])) < speech / 100


def test_a_file_is_read_as_its_pieces_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    data = sound_file(noise(300.0, RATE), RATE, "FLAC")
    path.write_bytes(data[: len(data) // 2])
    pieces = split_audio(path, segment_seconds=20)
    assert next(pieces).start == 0.0
    with pytest.raises(MediaError) as error:
        list(pieces)
    assert str(error.value).startswith(f"{path} ends after 1")


def test_the_length_is_told_before_the_first_piece() -> None:
    told: list[float | None] = []
    next(split_audio((noise(3.5, 48000), 48000), on_open=told.append))
    next(split_audio(sound_file(noise(3.5, RATE), RATE), on_open=told.append))
    next(split_audio(load_audio((noise(3.5, RATE), RATE)), on_open=told.append))
    assert told == [3.5, 3.5, 3.5]
    next(split_audio(sound_file(noise(3.5, RATE), RATE, "MP3"), on_open=told.append))
    assert told[3] == pytest.approx(3.5, abs=0.1)


def test_limits_hold_for_pieces_too() -> None:
    data = sound_file(noise(30.0, RATE), RATE)
    with pytest.raises(MediaError) as error:
        next(split_audio(data, Limits(max_seconds=29)))
    assert str(error.value) == "The data is longer than 29 s."
    assert error.value.hint == "If you trust it, raise the limit with --max-seconds."
