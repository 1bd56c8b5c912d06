"""Subtitles that people can read: a stretch of speech to cues of two lines, between its pauses.

Line length and time on screen after the BBC's Subtitle Guidelines and Netflix's Timed Text Style
Guide: 42 columns, of which a Chinese, Japanese or Korean character takes two, and 7 seconds. All
that is known of the times are those of the stretch and of the pauses in it; between them the words
are taken to come at an even pace, and a pause to fall where a sentence or a clause ends near it.
"""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

COLUMNS = 42  # of a line
LONGEST = 7.0  # s that a cue stays
SHORTEST = 1.0  # s that it stays where nothing follows so soon
PAUSE = 0.4  # s: shorter ones part no cues
COLUMNS_PER_SECOND = 20.0  # that people read
LEAD = 0.25  # s that a cue which would be too short may come early

Span = tuple[float, float]

_CLOSING = "\"'”’»›)]}」』）】〉》〕｣"
_OPENING = "\"'“‘«‹([{「『（【〈《〔｢"
_SENTENCE_END = ".!?…。！？؟।｡"
_CLAUSE_END = ",;:–—、，；：،؛､"
# What begins no line in Chinese and Japanese; source: JIS X 4051, cl-02 to cl-11.
_NEVER_FIRST = (
    _CLOSING
    + _SENTENCE_END
    + _CLAUSE_END
    + "・‐〜～ーヽヾゝゞ々〻ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ"
)
_JOINER = "\u200d"


@dataclass(frozen=True)
class Cue:
    """Words said from `start` to `end`, in seconds from the beginning.

    Attributes:
        spoken: where in that time somebody speaks, as far as that is known.
        quiet_until: when it may be that somebody speaks again; `end` where None.
    """

    start: float
    end: float
    text: str
    spoken: tuple[Span, ...] = field(default=(), kw_only=True, repr=False)
    quiet_until: float | None = field(default=None, kw_only=True, repr=False)


@dataclass(frozen=True)
class _Unit:
    """What stays on one line: a word, or a character of a script that is written without blanks."""

    text: str
    blank: bool  # before it
    width: int

    @property
    def pause(self) -> int:
        """How well a pause fits behind it: 0 best, 2 least."""
        last = self.text.rstrip(_CLOSING)[-1:]
        return 0 if last and last in _SENTENCE_END else 1 if last and last in _CLAUSE_END else 2


def readable(cue: Cue) -> list[Cue]:
    """Cut a cue into such as people can read, in order and without overlap; none of no text."""
    units = _units(cue.text)
    if not units:
        return []
    phrases = _phrases(cue)
    edges = [0, *_pauses_at(units, phrases), len(units)]
    cues = [
        part
        for phrase, (first, last) in zip(phrases, pairwise(edges), strict=True)
        for part in _lay_out(units[first:last], phrase)
    ]
    return _with_time_to_read(cues, cue)


# ---- words ----


def columns(text: str) -> int:
    """Count the columns of a text: two for a wide character, none for a mark on another."""
    return sum(
        0
        if unicodedata.category(each) in ("Mn", "Me", "Cf")
        else 1 + (unicodedata.east_asian_width(each) in "WF")
        for each in text
    )


def _units(text: str) -> list[_Unit]:
    units: list[_Unit] = []
    for word in text.split():
        parts = [part for piece in _breakable(word) for part in _no_wider(piece)]
        units += [_Unit(part, index == 0, columns(part)) for index, part in enumerate(parts)]
    return units


def _clusters(word: str) -> list[str]:
    """Characters, each with the marks that stand on it."""
    clusters: list[str] = []
    for each in word:
        if clusters and (columns(each) == 0 or clusters[-1].endswith(_JOINER)):
            clusters[-1] += each
        else:
            clusters.append(each)
    return clusters


def _breakable(word: str) -> list[str]:
    """The parts of a word between which a line may end."""
    parts = [""]
    for cluster in _clusters(word):
        before = parts[-1]
        if before and _may_part(before[-1], cluster[0]) and before.rstrip(_OPENING):
            parts.append("")
        parts[-1] += cluster
    return parts


def _may_part(before: str, after: str) -> bool:
    if after in _NEVER_FIRST or before in _OPENING:
        return False
    names = [unicodedata.name(each, "") for each in (before, after)]
    if all(name.startswith("KATAKANA") for name in names):
        return False
    return any(
        unicodedata.east_asian_width(each) in "WF" and not name.startswith("HANGUL")
        for each, name in zip((before, after), names, strict=True)
    )


def _no_wider(part: str) -> list[str]:
    """A word as it is, or what fits on lines where it is longer than one."""
    if columns(part) <= COLUMNS:
        return [part]
    cut = [""]
    for cluster in _clusters(part):
        if cut[-1] and columns(cut[-1] + cluster) > COLUMNS:
            cut.append("")
        cut[-1] += cluster
    return cut


# ---- time ----


class _Phrase:
    """Speech without a long pause; a clock that runs only while somebody speaks."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.ends = list(accumulate(end - start for start, end in spans))
        self.seconds = self.ends[-1]

    def begins(self, spoken: float) -> float:
        """When a word begins before which so many seconds were spoken."""
        return self._time(spoken, min(bisect_right(self.ends, spoken), len(self.ends) - 1))

    def stops(self, spoken: float) -> float:
        """When a word ends up to which so many seconds were spoken."""
        return self._time(spoken, min(bisect_left(self.ends, spoken), len(self.ends) - 1))

    def _time(self, spoken: float, index: int) -> float:
        start, end = self.spans[index]
        return min(max(end - (self.ends[index] - spoken), start), end)


def _phrases(cue: Cue) -> list[_Phrase]:
    spans = [
        (max(start, cue.start), min(end, cue.end))
        for start, end in cue.spoken
        if start < cue.end and end > cue.start
    ] or [(cue.start, max(cue.start, cue.end))]
    groups = [[spans[0]]]
    for before, span in pairwise(spans):
        if span[0] - before[1] >= PAUSE:
            groups.append([])
        groups[-1].append(span)
    return [_Phrase(group) for group in groups]


def _weights(units: Sequence[_Unit]) -> list[int]:
    """How long each takes to say, up to each: by its width, with something for the word itself."""
    return list(accumulate((unit.width + unit.blank for unit in units), initial=0))


def _pauses_at(units: Sequence[_Unit], phrases: Sequence[_Phrase]) -> list[int]:
    """Before which unit each pause between phrases falls, by dynamic programming.

    It costs the square of the seconds by which it lies from where an even pace puts it, something
    where no sentence or clause ends, and something where nothing is said in a phrase.
    """
    weights = _weights(units)
    spoken = list(accumulate(phrase.seconds for phrase in phrases))
    times = [spoken[-1] * weight / (weights[-1] or 1) for weight in weights]
    fits = [0.0, *((0.0, 0.3, 0.8)[unit.pause] for unit in units)]
    best = [0.0] + [math.inf] * len(units)
    chosen: list[list[int]] = []
    for phrase, pause in zip(phrases, spoken[:-1], strict=False):
        least, place, row, places = math.inf, 0, [], []
        for index, time in enumerate(times):
            stays = best[index] + _wordless(phrase) < least
            cost = best[index] + _wordless(phrase) if stays else least
            row.append(cost + (time - pause) ** 2 + fits[index])
            places.append(index if stays else place)
            if best[index] < least:
                least, place = best[index], index
        best = row
        chosen.append(places)
    best[-1] += _wordless(phrases[-1])
    found: list[int] = []
    index = min(range(len(best)), key=best.__getitem__)
    for places in reversed(chosen):
        found.append(index)
        index = places[index]
    return found[::-1]


def _wordless(phrase: _Phrase) -> float:
    return min(2 * phrase.seconds, 1.0)


def _with_time_to_read(cues: Sequence[Cue], whole: Cue) -> list[Cue]:
    """Let cues stay on into the pause behind them, until they are read or the next one comes."""
    read: list[Cue] = []
    quiet = max(whole.end, whole.quiet_until or 0.0)
    for index, cue in enumerate(cues):
        limit = cues[index + 1].start if index + 1 < len(cues) else quiet
        wanted = max(SHORTEST, columns(cue.text) / COLUMNS_PER_SECOND)
        end = min(max(cue.end, min(cue.start + wanted, limit)), cue.start + LONGEST)
        start = cue.start
        if end - start < SHORTEST:
            earliest = read[-1].end if read else whole.start
            start = min(start, max(earliest, start - LEAD, end - SHORTEST))
        read.append(Cue(round(start, 3), round(end, 3), cue.text))
    return read


# ---- lines ----


def _lay_out(units: Sequence[_Unit], phrase: _Phrase) -> list[Cue]:
    """Cues of two lines of what is said in a phrase: few, ending where sentences and clauses do."""
    weights = _weights(units)
    scale = phrase.seconds / (weights[-1] or 1)
    begins = [phrase.begins(scale * weight) for weight in weights]
    stops = [phrase.stops(scale * weight) for weight in weights]
    lines = _Lines(units)
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost up to each unit, and where its cue begins
    for last in range(1, len(units) + 1):
        options: list[tuple[float, int]] = []
        for first in range(last - 1, -1, -1):
            seconds = stops[last] - begins[first]
            if first < last - 1 and (seconds > LONGEST or not lines.fit(first, last)):
                break
            hurry = max(SHORTEST - seconds, 0.0)
            scrap = max(1 - lines.width(first, last) / COLUMNS, 0.0) ** 2 / 2
            ending = 0.0 if last == len(units) else (0.0, 0.4, 1.6)[units[last - 1].pause]
            options.append((best[first][0] + 1 + hurry + scrap + ending, first))
        best.append(min(options))
    cues: list[Cue] = []
    last = len(units)
    while last:
        first = best[last][1]
        cues.append(Cue(begins[first], stops[last], lines.text(first, last)))
        last = first
    return cues[::-1]


class _Lines:
    """Units on lines."""

    def __init__(self, units: Sequence[_Unit]) -> None:
        self._units = units
        self._ends = list(accumulate((unit.width + unit.blank for unit in units), initial=0))

    def width(self, first: int, last: int) -> int:
        """Columns of the units on one line."""
        return self._ends[last] - self._ends[first] - self._units[first].blank

    def fit(self, first: int, last: int) -> bool:
        """Tell whether they fit on two lines."""
        longest = self._ends[first] + self._units[first].blank + COLUMNS
        middle = bisect_right(self._ends, longest) - 1  # where a full first line ends
        return middle >= last or self.width(middle, last) <= COLUMNS

    def text(self, first: int, last: int) -> str:
        """Write them on one line, or on two of which the first ends where that reads well."""
        middle = self._break(first, last)
        edges = [(first, middle), (middle, last)] if middle > first else [(first, last)]
        return "\n".join(self._line(*edge) for edge in edges)

    def _line(self, first: int, last: int) -> str:
        units = self._units[first:last]
        return "".join(" " * unit.blank + unit.text for unit in units).lstrip(" ")

    def _break(self, first: int, last: int) -> int:
        """Where the second line begins; `first` where one will do. They must `fit`."""
        if self.width(first, last) <= COLUMNS:
            return first
        fitting = [
            middle
            for middle in range(first + 1, last)
            if self.width(first, middle) <= COLUMNS and self.width(middle, last) <= COLUMNS
        ]
        return min(fitting, key=lambda middle: self._rag(first, middle, last))

    def _rag(self, first: int, middle: int, last: int) -> float:
        """How badly a pair of lines reads: uneven, or parted within a clause."""
        uneven = abs(self.width(first, middle) - self.width(middle, last))
        return uneven + (0, 6, 16)[self._units[middle - 1].pause]
