"""Long recordings to pieces that the model was trained to transcribe, cut where nobody speaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phimlx.errors import MediaError
from phimlx.media.audio_file import AudioSource, open_audio
from phimlx.media.limits import Limits
from phimlx.media.log_mel import AudioClip, Samples

TRAINED_SECONDS = 40.0
SHORTEST_PIECE = 1.0

STEP = 0.01  # s between two looks at how loud it is
SILENCE = 1e-7  # mean square: 70 dB under full scale, where no recorder hears a voice
PAUSE = 0.15  # s: shorter gaps lie inside words
SKIPPED = 1.0  # s of silence that is left out between pieces
MARGIN = 0.25  # s of silence that stays before and after a piece

# Between words it is this much quieter than while somebody speaks: 20 dB.
_QUIETER = 0.01
# And louder than this above the background: 6 dB.
_BACKGROUND = 4.0


# A sound this short between two pauses is a click, not speech.
_CLICK = 0.06

Span = tuple[float, float]


@dataclass(frozen=True)
class Segment:
    """One piece of a recording; `start` and `end` in seconds from its beginning.

    `quiet_until` is the moment up to which nothing is heard behind it; `end` where None.
    """

    start: float
    end: float
    samples: Samples
    rate: int
    quiet_until: float | None = None

    @property
    def spoken(self) -> tuple[Span, ...]:
        """Where somebody speaks, in seconds as `start` is: what lies between pauses."""
        step = round(STEP * self.rate)
        loudness = mean_squares(self.samples, step)
        pauses = _runs(loudness < _quiet_level(loudness), round(PAUSE / STEP))
        edges = [0, *(edge for pause in pauses for edge in pause), len(loudness)]
        spans = [pair for pair in zip(edges[::2], edges[1::2], strict=True) if pair[0] < pair[1]]
        return tuple(
            (self.start + STEP * first, min(self.start + STEP * last, self.end))
            for first, last in spans
            if (last - first) * STEP >= _CLICK
        )

    @property
    def clip(self) -> AudioClip:
        return AudioClip(self.samples, self.rate)


def split_audio(
    source: AudioSource,
    limits: Limits | None = None,
    segment_seconds: float = TRAINED_SECONDS,
    on_open: Callable[[float | None], None] | None = None,
) -> Iterator[Segment]:
    """Cut a recording into pieces, each yielded as soon as it is read; MediaError as `open_audio`.

    Holds about one piece of decoded sound at a time, however long the recording.

    A recording that fits into `segment_seconds` stays whole. A longer one is cut in the middle of
    the longest pause in the second half of what fits, or, where there is none there, in the first
    half; where nobody pauses at all, at the quietest moment of the last quarter. Between pieces,
    silence of more than a second is left out, and pieces of nothing but silence are too: every
    moment that is louder than `SILENCE` is in a piece.

    Of a recording that is damaged or cut short, the pieces before come first, then the error.

    Args:
        on_open: called with the recording's length in seconds, None where it does not say.
    """
    check_seconds(segment_seconds)
    with open_audio(source, limits) as sound:
        if on_open is not None:
            on_open(sound.seconds)
        failures: list[MediaError] = []
        yield from _pieces(up_to_failure(sound.blocks, failures), sound.rate, segment_seconds)
        if failures:
            raise failures[0]


def up_to_failure(blocks: Iterable[Samples], failures: list[MediaError]) -> Iterator[Samples]:
    """Yield what can be read; what ends it early goes into `failures`."""
    try:
        yield from blocks
    except MediaError as error:
        failures.append(error)


def check_seconds(segment_seconds: float) -> None:
    """Raise MediaError where the model cannot hear pieces of that length."""
    if not SHORTEST_PIECE <= segment_seconds <= TRAINED_SECONDS:
        raise MediaError(
            f"Pieces of {segment_seconds:g} s cannot be transcribed.",
            hint=f"Phi-4 was trained on {SHORTEST_PIECE:g} to {TRAINED_SECONDS:g} s.",
        )


def _pieces(blocks: Iterable[Samples], rate: int, segment_seconds: float) -> Iterator[Segment]:
    step = round(STEP * rate)
    longest = int(segment_seconds * rate)
    # What follows the longest piece is looked at too, so that no scrap is left behind it.
    rest = int(SHORTEST_PIECE / 4 * rate)
    held = np.empty(0, np.float32)
    start = 0  # where `held` begins, in samples
    for block in blocks:
        held = np.concatenate((held, block)) if len(held) else block
        while len(held) >= longest + rest:
            end = cut_point(mean_squares(held[:longest], step), step)
            yield from _trimmed(held[:end], start, rate)
            held = held[end:]
            start += end
    if len(held) > longest:
        window = held[: min(longest, len(held) - rest)]
        end = cut_point(mean_squares(window, step), step)
        yield from _trimmed(held[:end], start, rate)
        held = held[end:]
        start += end
    if start == 0:
        if len(held) and np.max(mean_squares(held, step)) > SILENCE:
            yield Segment(0.0, len(held) / rate, held.copy(), rate)
    else:
        yield from _trimmed(held, start, rate)


def mean_squares(samples: Samples, step: int) -> NDArray[np.float64]:
    """Compute the mean square of each step; of the last one what there is of it. `[steps]`"""
    squares = np.square(samples, dtype=np.float64)
    edges = np.arange(0, len(samples), step)
    return np.add.reduceat(squares, edges) / np.diff(np.append(edges, len(samples)))


def cut_point(loudness: NDArray[np.float64], step: int) -> int:
    """Find the sample to cut at, within the steps looked at."""
    steps = len(loudness)
    pauses = _runs(loudness < _quiet_level(loudness), round(PAUSE / STEP))
    half, quarter = steps // 2, 3 * steps // 4
    late = [(max(first, half), last) for first, last in pauses if last > half]
    early = [(first, last) for first, last in pauses if first + last > SHORTEST_PIECE / STEP]
    if candidates := late or early:
        first, last = max(candidates, key=lambda pause: (pause[1] - pause[0], pause[0]))
        return (first + last) // 2 * step
    return (quarter + int(np.argmin(loudness[quarter:-1]))) * step


def _quiet_level(loudness: NDArray[np.float64]) -> float:
    background, speech = np.percentile(loudness, (10, 95))
    return max(SILENCE, min(background * _BACKGROUND, speech * _QUIETER))


def _runs(flags: NDArray[np.bool_], shortest: int) -> list[tuple[int, int]]:
    """(first, behind the last) of each run of true flags of at least `shortest`."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    pairs = edges.reshape(-1, 2).tolist()
    return [(first, last) for first, last in pairs if last - first >= shortest]


def _trimmed(samples: Samples, start: int, rate: int) -> Iterator[Segment]:
    """A piece without long silence at its ends; nothing where it is all silence."""
    step = round(STEP * rate)
    if not len(samples):
        return
    heard = np.flatnonzero(mean_squares(samples, step) > SILENCE)
    if not len(heard):
        return
    first, last = int(heard[0]) * step, min((int(heard[-1]) + 1) * step, len(samples))
    skipped, margin = round(SKIPPED * rate), round(MARGIN * rate)
    begin = first - margin if first > skipped else 0
    end = last + margin if len(samples) - last > skipped else len(samples)
    # A copy: a view would keep the whole of what was read alive.
    piece = samples[begin:end].copy()
    until = (start + len(samples)) / rate
    yield Segment((start + begin) / rate, (start + end) / rate, piece, rate, until)
