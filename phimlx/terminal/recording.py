"""The microphone beside a screen: a clip for a chat, and how loud it is meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import select
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from platformdirs import user_state_path

from phimlx.errors import MediaError, PhimlxError
from phimlx.files import translate_write_errors, write_file
from phimlx.media.audio_file import AudioStream
from phimlx.media.log_mel import Samples
from phimlx.media.microphone import only_zeros, open_microphone
from phimlx.media.segments import MARGIN, STEP
from phimlx.media.speech import SHORTEST, SpeechDetector
from phimlx.terminal.transcripts import clock

if TYPE_CHECKING:
    from phimlx.terminal.output import Output

QUIET_SECONDS = 2.0  # after speech, which end a clip
UNHEARD_SECONDS = 10.0  # without any, after which nobody will speak
BARS = 20  # with the time, less than a terminal of 40 columns
LOWEST_DB = -60.0  # under full scale, where the meter begins


@dataclass(frozen=True)
class Clip:
    """A file of what was recorded, and what ended it before its speaker did."""

    path: Path
    failure: MediaError | None = None


def recording_folder() -> Path:
    """Return the folder that keeps what was recorded, for its owner alone."""
    return user_state_path("phimlx") / "recorded"


def record_clip(output: Output, max_seconds: float) -> Clip:
    """Record until Enter or Space, or until its speaker has been quiet for a while.

    Raises:
        MediaError: where nothing can be recorded, or nothing was heard.
        PhimlxError: where it cannot be kept.
        KeyboardInterrupt: where it is not wanted after all.
    """
    heard = _Heard()
    failure: MediaError | None = None
    ended = False
    with open_microphone() as microphone, output.live_line() as line, _keys() as pressed:
        heard.rate = microphone.sound.rate
        try:
            output.note("Speak. Enter sends it, Ctrl-C drops it.")
            for block in metered(microphone.sound, line):
                heard.add(block)
                ended = pressed()
                if ended or heard.is_over or heard.seconds >= max_seconds:
                    break
        except MediaError as error:
            if not heard.spoken:
                raise
            failure = error
    if microphone.lost:
        output.warning(f"about {microphone.lost:.1f} s of what was said were lost.")
    return Clip(_keep(heard.everything() if ended else heard.speech(), heard.rate), failure)


def metered(sound: AudioStream, line: Callable[[str], None]) -> Iterator[Samples]:
    """Yield the blocks of a sound, and show how long and how loud it is."""
    samples = 0
    for block in sound.blocks:
        samples += len(block)
        if len(block):
            line(f"● {clock(samples / sound.rate)} {meter(block)}")
        yield block


def meter(block: Samples) -> str:
    """Draw how loud a block is, in decibels under full scale."""
    square = float(np.mean(np.square(block, dtype=np.float64)))
    level = 10 * math.log10(square) if square > 0 else LOWEST_DB
    full = round(BARS * min(max(1 - level / LOWEST_DB, 0.0), 1.0))
    return "█" * full + "·" * (BARS - full)


class _Heard:
    """What came from the microphone so far."""

    rate = 16_000

    def __init__(self) -> None:
        self._detector: SpeechDetector | None = None
        self._blocks: list[Samples] = []
        self._speech: list[Any] = []
        self.spoken = 0.0  # s
        self._quiet = 0  # steps since somebody spoke
        self._samples = 0
        self._loud = False

    def add(self, block: Samples) -> None:
        """Take the next block."""
        self._detector = self._detector or SpeechDetector(self.rate)
        self._blocks.append(block)
        self._samples += len(block)
        self._loud = self._loud or bool(block.any())
        speech = self._detector.add(block)
        self._speech.append(speech)
        self.spoken += STEP * int(speech.sum())
        loud = np.flatnonzero(speech)
        self._quiet = len(speech) - 1 - int(loud[-1]) if len(loud) else self._quiet + len(speech)

    @property
    def seconds(self) -> float:
        return self._samples / self.rate

    @property
    def is_over(self) -> bool:
        """Whether its speaker has ended, or nobody began."""
        if self.spoken < SHORTEST:
            return self.seconds >= UNHEARD_SECONDS
        return self._quiet * STEP >= QUIET_SECONDS

    def everything(self) -> Samples:
        """Return what was recorded; raises `MediaError` where that is nothing."""
        if not self._loud and self.seconds >= SHORTEST:
            raise only_zeros()
        if self.seconds < SHORTEST:
            raise MediaError("Nothing was recorded.", hint="Say /record, and then what you want.")
        return np.concatenate(self._blocks)

    def speech(self) -> Samples:
        """Return it without the silence around it; raises `MediaError` where it is nothing else."""
        whole = self.everything()
        if self.spoken < SHORTEST:
            raise MediaError(
                "Nobody was heard.",
                hint="Choose another input in the system's sound settings, or speak louder.",
            )
        loud = np.flatnonzero(np.concatenate(self._speech))
        margin = round(MARGIN / STEP)
        first, last = max(int(loud[0]) - margin, 0), int(loud[-1]) + 1 + margin
        step = round(STEP * self.rate)
        return whole[first * step : last * step]


def _keep(samples: Samples, rate: int) -> Path:
    """Write what was heard as FLAC, under its digest: a chat that is kept names its files."""
    import soundfile  # type: ignore[import-untyped]

    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
    data = file.getvalue()
    path = recording_folder() / f"recorded-{hashlib.sha256(data).hexdigest()[:12]}.flac"
    with translate_write_errors(path, PhimlxError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(path, data, private=True)
    return path


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[], bool]]:
    """Make a function that tells whether Enter or Space was pressed; keys are not shown."""
    import termios
    import tty

    terminal: Any = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal, termios.TCSAFLUSH)

    def pressed() -> bool:
        while select.select([terminal], [], [], 0)[0]:
            keys = os.read(terminal, 64)
            if not keys or any(key in keys for key in b"\r\n "):
                return True
        return False

    try:
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
