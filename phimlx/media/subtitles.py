"""Transcripts as plain text, SubRip, WebVTT or JSON: times and texts in, one piece of text out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from phimlx.media.cues import Cue, readable


@dataclass(frozen=True)
class TranscriptFormat:
    """One format as a stream: what opens it, each cue with its number from 1, what closes it.

    `split` makes the cues of what was understood at once.
    """

    head: str
    cue: Callable[[int, Cue], str]
    tail: str = ""
    split: Callable[[Cue], list[Cue]] = lambda cue: [cue] if cue.text.strip() else []

    def write(self, cues: Iterable[Cue]) -> str:
        """Write the whole transcript; parts without text are left out, and not counted."""
        spoken = [part for cue in cues for part in self.split(cue)]
        return self.head + "".join(map(self.cue, range(1, len(spoken) + 1), spoken)) + self.tail


def _txt(number: int, cue: Cue) -> str:
    return " ".join(cue.text.split()) + "\n"


def _srt(number: int, cue: Cue) -> str:
    times = f"{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}"
    # SubRip has no escapes: an arrow of its own kind would read as times.
    return f"{number}\n{times}\n{_lines(cue.text).replace('-->', '→')}\n\n"


def _vtt(number: int, cue: Cue) -> str:
    times = f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}"
    text = _lines(cue.text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"\n{times}\n{text}\n"


def _json(number: int, cue: Cue) -> str:
    fields = {"start": round(cue.start, 3), "end": round(cue.end, 3), "text": cue.text.strip()}
    return ("" if number == 1 else ",") + "\n  " + json.dumps(fields, ensure_ascii=False)


def _lines(text: str) -> str:
    """A text in which no empty line ends the cue early."""
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _clock(seconds: float, point: str) -> str:
    """`hh:mm:ss` and thousandths behind the given point; hours beyond 99 take more digits."""
    whole, thousandths = divmod(round(max(seconds, 0.0) * 1000), 1000)
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{whole:02}{point}{thousandths:03}"


# Sources: the SubRip format as its players read it; WebVTT, W3C Candidate Recommendation, 4.
FORMATS = {
    "txt": TranscriptFormat("", _txt),
    "srt": TranscriptFormat("", _srt, split=readable),
    "vtt": TranscriptFormat("WEBVTT\n", _vtt, split=readable),
    "json": TranscriptFormat('{"segments": [', _json, "\n]}\n"),
}
