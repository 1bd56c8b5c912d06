"""A transcript of the microphone, written while somebody speaks."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

from phimlx.media.microphone import Microphone, only_zeros, open_microphone
from phimlx.terminal.recording import UNHEARD_SECONDS, metered
from phimlx.terminal.transcripts import clock

if TYPE_CHECKING:
    from phimlx.media.log_mel import Samples
    from phimlx.terminal.output import Output
    from phimlx.terminal.transcripts import Transcript, TranscriptWriter
    from phimlx.transcription import TranscriptSegment

LATE = 20.0  # s that a model may lag behind before it is told
MICROPHONE = "microphone"


def transcribe_live(
    listen: Callable[..., Iterator[TranscriptSegment]],
    transcript: Transcript,
    writer: TranscriptWriter,
    output: Output,
) -> None:
    """Write down what the microphone hears, piece by piece, until Ctrl-C.

    What was said until then is still understood; a second Ctrl-C does without.

    Args:
        listen: `Phi.transcribe` with its options.

    Raises:
        MediaError: where there is no microphone, or it goes away.
    """
    with (
        open_microphone() as microphone,
        _first_interrupt(microphone.stop),
        output.live_line() as line,
    ):
        output.note("Listening; Ctrl-C ends it.")
        remarks = _Remarks(microphone, output, line)
        blocks = remarks.watched(metered(microphone.sound, line))
        for piece in listen(replace(microphone.sound, blocks=blocks)):
            line("")
            writer.add(piece)
            remarks.tell()
    transcript.complete = True
    output.note(f"Listened for {clock(remarks.seconds)}.")


class _Remarks:
    """What is told, once, of a microphone that does not do as it should."""

    def __init__(self, microphone: Microphone, output: Output, line: Callable[[str], None]) -> None:
        self.seconds = 0.0
        self._microphone = microphone
        self._output = output
        self._line = line
        self._lost = 0.0
        self._told: set[str] = set()

    def watched(self, blocks: Iterator[Samples]) -> Iterator[Samples]:
        """Yield blocks, and tell where none of them holds anything."""
        heard = False
        for block in blocks:
            self.seconds += len(block) / self._microphone.sound.rate
            heard = heard or bool(block.any())
            if not heard and self.seconds >= UNHEARD_SECONDS:
                error = only_zeros()
                self._warn("zeros", f"{error} {error.hint}")
            self._note_rest()
            yield block
        self._note_rest()

    def _note_rest(self) -> None:
        """Tell, once it was stopped, that the last words are still on their way."""
        if self._microphone.is_stopped and "rest" not in self._told:
            self._told.add("rest")
            self._line("")
            self._output.note("Writing down the last words; Ctrl-C does without them.")

    def tell(self) -> None:
        """Tell what was lost, and that the model is behind."""
        lost, self._lost = self._microphone.lost - self._lost, self._microphone.lost
        if lost:
            self._line("")
            moment = clock(self.seconds)
            self._output.warning(f"about {lost:.1f} s of sound were lost before {moment}.")
        if self._microphone.waiting > LATE:
            self._warn(
                "late",
                f"the model is {self._microphone.waiting:.0f} s behind what is said; "
                "what is said meanwhile waits for it.",
            )

    def _warn(self, name: str, text: str) -> None:
        if name not in self._told:
            self._told.add(name)
            self._line("")
            self._output.warning(text)


@contextlib.contextmanager
def _first_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` for the first Ctrl-C; the second one interrupts as ever."""
    previous = signal.getsignal(signal.SIGINT)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, previous)
        stop()

    if previous is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
