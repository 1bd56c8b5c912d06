"""A transcript on its way to a file or to stdout: whole after every piece, however the run ends."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from phimlx.errors import PhimlxError
from phimlx.files import translate_write_errors, write_file
from phimlx.media.cues import Cue
from phimlx.media.subtitles import TranscriptFormat
from phimlx.terminal.output import Output, printable

if TYPE_CHECKING:
    from phimlx.transcription import TranscriptSegment

STDIN = "-"
REMARKS = {
    "length": "was cut for its length: it may be incomplete.",
    "loop": "repeated itself: what came after the first time is left out.",
}


@dataclass
class Transcript:
    """Transcript of one recording, as far as it has come.

    Attributes:
        name: of the file, as it was given; `-` for stdin.
        target: the file that it is written to; stdout where None.
        seconds: the recording's length, where it says it.
    """

    name: str
    target: Path | None
    label: str = ""
    pieces: list[TranscriptSegment] = field(default_factory=list)
    seconds: float | None = None
    error: str | None = None
    hint: str | None = None
    complete: bool = False

    def __post_init__(self) -> None:
        self.label = self.label or ("stdin" if self.name == STDIN else self.name)

    @property
    def source(self) -> Any:
        return sys.stdin.buffer if self.name == STDIN else self.name

    @property
    def until(self) -> float:
        """How far it has come, in seconds from the recording's beginning."""
        return self.pieces[-1].end if self.pieces else 0.0

    def as_object(self) -> dict[str, Any]:
        """Make the object that `--json` prints."""
        return {
            "file": self.name,
            "text": " ".join(piece.text for piece in self.pieces if piece.text),
            "segments": [
                {
                    "start": round(piece.start, 3),
                    "end": round(piece.end, 3),
                    "text": piece.text,
                    "finish_reason": piece.finish_reason,
                }
                for piece in self.pieces
            ],
            "until": round(self.until, 3),
            "complete": self.complete,
            "error": self.error,
        }


class TranscriptWriter:
    """Shows pieces on stdout as they come, or keeps the file whole after each.

    A file that cannot be written meanwhile is told of once and tried again in the end, where what
    was to be in it goes to stdout and the error is raised.
    """

    def __init__(
        self,
        transcript: Transcript,
        format: TranscriptFormat,
        output: Output,
        echoes: bool = False,
    ) -> None:
        """Begin a transcript.

        Args:
            echoes: whether somebody who watches is shown what goes into a file.
        """
        self._echoes = echoes and output.is_watched
        self._transcript = transcript
        self._format = format
        self._output = output
        self._number = 0
        self._written: list[str] = []  # cues, as the format writes them
        self._failed = False

    def __enter__(self) -> Self:
        if self._transcript.target is None:
            self._output.write(self._format.head)
        return self

    def add(self, piece: TranscriptSegment) -> None:
        """Put the next piece into the transcript."""
        transcript, output = self._transcript, self._output
        transcript.pieces.append(piece)
        cues = self._cues(piece)
        self._written += cues
        with output.beside_bars():
            if transcript.target is None:
                output.write("".join(cues))
            else:
                self._keep(transcript.target)
                if self._echoes and piece.text:
                    output.note(piece.text, style_name=None)
            if piece.finish_reason in REMARKS:
                place = f"{transcript.label}, from {piece.start:.1f} to {piece.end:.1f} s"
                output.warning(f"{place}: the text {REMARKS[piece.finish_reason]}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        transcript, output = self._transcript, self._output
        if transcript.target is None:
            output.write(self._format.tail)
        elif transcript.pieces or transcript.complete:
            try:
                self._write(transcript.target)
            except PhimlxError:
                output.write(self._text())  # it took long to make
                raise
            output.note(f"Wrote {transcript.target}.")
        if isinstance(error, KeyboardInterrupt):
            output.note(stopped(transcript))

    def _cues(self, piece: TranscriptSegment) -> list[str]:
        cues = []
        for cue in self._format.split(_clean(piece)):
            self._number += 1
            cues.append(self._format.cue(self._number, cue))
        return cues

    def _keep(self, target: Path) -> None:
        try:
            self._write(target)
        except PhimlxError as error:
            if not self._failed:
                self._output.warning(f"{error} It is tried again.")
            self._failed = True

    def _write(self, target: Path) -> None:
        with translate_write_errors(target, PhimlxError):
            write_file(target, self._text())

    def _text(self) -> str:
        return "".join((self._format.head, *self._written, self._format.tail))


def stopped(transcript: Transcript) -> str:
    """Say that a transcript was stopped, and where."""
    if not transcript.pieces:
        return f"Stopped before anything of {transcript.label} was understood."
    whole = "" if transcript.seconds is None else f" of {clock(transcript.seconds)}"
    return f"Stopped: {transcript.label} is written down up to {clock(transcript.until)}{whole}."


def clock(seconds: float) -> str:
    """Write a time as people do, `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _clean(piece: TranscriptSegment) -> Cue:
    """A piece without what a terminal would obey."""
    return Cue(
        piece.start,
        piece.end,
        printable(piece.text),
        spoken=piece.spoken,
        quiet_until=piece.quiet_until,
    )
