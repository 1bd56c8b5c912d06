"""The microphone as a sound that is still being made: blocks at the model's rate, as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

from phimlx.errors import MediaError, shortened
from phimlx.extras import import_extra
from phimlx.media.audio_file import AudioStream, model_rate, resampled
from phimlx.media.log_mel import Samples

BLOCK_SECONDS = 0.05
STALL_SECONDS = 5.0  # without a block, after which a device is gone
WAITING_SECONDS = 600.0  # of sound that may wait for whoever reads it


class Microphone:
    """An open microphone.

    Attributes:
        sound: what it hears, mono `[samples]` at the model's rate, until `stop`. MediaError where
            the device goes away; what it heard before comes first.
        lost: seconds, about, that never came here, for the machine or the reader was too slow.
    """

    def __init__(self, rate: int) -> None:
        self.lost = 0.0
        self._rate = rate
        self._stopped = False
        self._blocks: SimpleQueue[Samples | None] = SimpleQueue()
        target = model_rate(rate)
        self.sound = AudioStream(target, resampled(self._recorded(), rate, target), None)

    @property
    def waiting(self) -> float:
        """Seconds of sound that nobody has read yet, about."""
        return self._blocks.qsize() * BLOCK_SECONDS

    @property
    def is_stopped(self) -> bool:
        """Whether it was told to stop; what waits still comes."""
        return self._stopped

    def stop(self) -> None:
        """End the sound; a signal handler may call it."""
        self._stopped = True
        self._blocks.put(None)

    def hear(self, samples: Any, frames: int, time: Any, status: Any) -> None:
        """Take a block `[frames, 1]` from the device's own thread."""
        if status.input_overflow or self.waiting > WAITING_SECONDS:
            self.lost += frames / self._rate
        if self.waiting <= WAITING_SECONDS:
            self._blocks.put(samples[:, 0].copy())

    def end(self) -> None:
        """Note that the device sends no more."""
        self._blocks.put(None)

    def _recorded(self) -> Iterator[Samples]:
        while True:
            try:
                block = self._blocks.get(timeout=STALL_SECONDS)
            except Empty:
                block = None
            if block is not None:
                yield block
            elif self._stopped:
                return
            else:
                raise MediaError(
                    "The microphone is gone: it sends no more sound.",
                    hint="Was it unplugged, or switched over? Connect it and begin again.",
                )


@contextmanager
def open_microphone() -> Iterator[Microphone]:
    """Open the system's microphone, at its own rate, for as long as the block runs.

    Raises:
        MediaError: sounddevice or PortAudio is missing, there is no microphone, or it cannot be
            opened.
    """
    without = "The microphone needs sounddevice, which is not installed."
    try:
        sounddevice = import_extra("sounddevice", "voice", without, MediaError)
    except OSError as error:  # its library, which wheels for Linux do not hold
        raise MediaError(
            "The microphone needs PortAudio, which is not installed.",
            hint="brew install portaudio"
            if sys.platform == "darwin"
            else "Install it, on Debian and Ubuntu with: sudo apt install libportaudio2",
        ) from error
    try:
        device = sounddevice.query_devices(kind="input")
    except (sounddevice.PortAudioError, ValueError) as error:
        raise MediaError(
            "There is no microphone.",
            hint="Connect one, or choose it as input in the system's sound settings.",
        ) from error
    rate = round(device["default_samplerate"])
    microphone = Microphone(rate)
    try:
        stream = sounddevice.InputStream(
            samplerate=rate,
            blocksize=round(BLOCK_SECONDS * rate),
            channels=1,
            dtype="float32",
            callback=microphone.hear,
            finished_callback=microphone.end,
        )
        stream.start()
    except sounddevice.PortAudioError as error:
        raise MediaError(
            f"The microphone cannot be opened: {shortened(_reason(error), 120)}.",
            hint="Close other programs that record, or choose another input in the system's "
            "sound settings.",
        ) from error
    try:
        yield microphone
    finally:
        microphone.stop()
        stream.close(ignore_errors=True)


def _reason(error: Exception) -> str:
    return str(error.args[0]) if error.args else type(error).__name__


def only_zeros() -> MediaError:
    """Make the error of a microphone that sends nothing at all, as where it may not be used."""
    return MediaError(
        "The microphone sends nothing but silence.",
        hint="Allow your terminal to use it in System Settings, Privacy & Security, Microphone; "
        "then start the terminal again."
        if sys.platform == "darwin"
        else "Switch it on, or choose another input in the system's sound settings.",
    )
