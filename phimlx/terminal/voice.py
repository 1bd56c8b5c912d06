"""A chat whose answers are read aloud, while that is wanted and works."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.generation.reply import Chunk
    from phimlx.terminal.speaker import Speaker


class Voice:
    """Hands answers to a speaker, where there is one."""

    def __init__(self, output: Output, waits: bool) -> None:
        """Make a voice that is off; `waits` for the end of an answer before anything else."""
        self._output = output
        self._waits = waits
        self._speaker: Speaker | None = None

    @property
    def name(self) -> str | None:
        """What speaks; None where it is off."""
        return None if self._speaker is None else self._speaker.program.name

    def turn(self, on: bool) -> None:
        """Begin to speak, or end that; raises `PhimlxError` where nothing here can."""
        self.hush()
        self._speaker = None
        if on:
            from phimlx.terminal.speaker import Speaker

            self._speaker = Speaker()

    def hear(self, chunk: Chunk) -> None:
        """Take the next part of an answer."""
        if self._speaker is not None:
            self._speaker.hear(chunk)

    def end(self) -> None:
        """End the answer; what is left of it is said while the next line is typed."""
        speaker = self._speaker
        if speaker is None:
            return
        speaker.end()
        if self._waits:
            speaker.wait()
        if speaker.failure is not None:
            self._speaker = None
            self._output.warning(f"{speaker.failure} Answers are read aloud no more.")

    def hush(self) -> bool:
        """Be quiet at once; whether there was something left to say."""
        if self._speaker is None:
            return False
        was_speaking = self._speaker.is_speaking
        self._speaker.stop()
        return was_speaking
