"""Speech while it is spoken: where somebody speaks, and pieces that end where nobody does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from phimlx.errors import MediaError
from phimlx.media.audio_file import AudioStream
from phimlx.media.log_mel import Samples
from phimlx.media.segments import (
    MARGIN,
    STEP,
    Segment,
    check_seconds,
    cut_point,
    mean_squares,
    up_to_failure,
)

HISTORY = 1000  # steps over which the background is told: 10 s
LOUDER = 8.0  # than the background is speech: 9 dB
# Mean squares between which that limit lies: recorders make noise, and a first word no pause.
QUIETEST, LOUDEST = 1e-6, 3e-4
SHORTEST = 0.15  # s of speech: less is a click
# Seconds that a piece has, and the pause that ends it then: the longer, the sooner.
PAUSES = ((12.0, 0.2), (6.0, 0.4), (0.0, 0.8))


class SpeechDetector:
    """Tells speech from the background, whose loudness it learns."""

    def __init__(self, rate: int) -> None:
        self._step = round(STEP * rate)
        self._rest: Samples = np.empty(0, np.float32)
        self._history: NDArray[np.float64] = np.empty(0)

    def add(self, samples: Samples) -> NDArray[np.bool_]:
        """Tell of each step that is whole now whether somebody speaks. `[steps]`"""
        held = np.concatenate((self._rest, samples))
        whole = len(held) // self._step * self._step
        self._rest = held[whole:]
        if not whole:
            return np.empty(0, np.bool_)
        loudness = mean_squares(held[:whole], self._step)
        self._history = np.concatenate((self._history, loudness))[-HISTORY:]
        limit = LOUDER * np.percentile(self._history, 10)
        return loudness > min(max(limit, QUIETEST), LOUDEST)


def split_live(sound: AudioStream, segment_seconds: float) -> Iterator[Segment]:
    """Cut a sound that is still being made into pieces, each as soon as its speaker pauses.

    A piece is at most `segment_seconds` long; one that nobody pauses in is cut where it is
    quietest. What is no speech is in none. Of a sound that breaks off, the pieces before come
    first, then the error.
    """
    check_seconds(segment_seconds)
    failures: list[MediaError] = []
    yield from _spoken_pieces(up_to_failure(sound.blocks, failures), sound.rate, segment_seconds)
    if failures:
        raise failures[0]


def _spoken_pieces(
    blocks: Iterable[Samples], rate: int, segment_seconds: float
) -> Iterator[Segment]:
    detector, step = SpeechDetector(rate), round(STEP * rate)
    longest, margin = round(segment_seconds / STEP), round(MARGIN / STEP)
    held: Samples = np.empty(0, np.float32)
    speech: NDArray[np.bool_] = np.empty(0, np.bool_)  # of the steps of `held`
    start = 0  # the step at which `held` begins

    def piece(end: int, quiet: int) -> Iterator[Segment]:
        """What is spoken up to a step; nobody speaks until another."""
        loud = np.flatnonzero(speech[:end])
        if len(loud) * STEP >= SHORTEST:
            first, last = max(int(loud[0]) - margin, 0), min(int(loud[-1]) + 1 + margin, end)
            samples = held[first * step : last * step].copy()
            times = [(start + edge) * STEP for edge in (first, last, quiet)]
            yield Segment(times[0], times[1], samples, rate, times[2])

    for block in blocks:
        held = np.concatenate((held, block))
        speech = np.concatenate((speech, detector.add(block)))
        loud = np.flatnonzero(speech)
        end = quiet = 0  # up to where `held` is done with, and nobody speaks
        if not len(loud):
            end = max(len(speech) - margin, 0)
        elif (len(speech) - 1 - loud[-1]) * STEP >= _pause((loud[-1] - loud[0]) * STEP):
            quiet = len(speech)
            end = max(int(loud[-1]) + 1, quiet - margin)  # the rest leads in what comes next
        elif len(speech) - max(loud[0] - margin, 0) >= longest:
            begin = max(int(loud[0]) - margin, 0)
            window = held[begin * step : (begin + longest) * step]
            end = begin + cut_point(mean_squares(window, step), step) // step
        yield from piece(end, max(end, quiet))
        held, speech, start = held[end * step :], speech[end:], start + end
    yield from piece(len(speech), len(speech))


def _pause(seconds: float) -> float:
    """The pause that ends a piece of so many seconds."""
    return next(pause for least, pause in PAUSES if seconds >= least)
