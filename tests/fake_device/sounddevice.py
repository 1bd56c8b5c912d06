"""A sounddevice whose microphone plays a file: as fast as it can, then as `FAKE_THEN` says.

FAKE_MICROPHONE is the file, FAKE_THEN what follows it: "silence" without end, at the speed of sound
or a little faster; "unplug", as a device that goes away; "stall", as one that says nothing of it.
FAKE_ERROR: "none" for no device, "busy" for one that cannot be opened. FAKE_OVERFLOW: the block
before which sound was lost.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import soundfile  # type: ignore[import-untyped]

if os.environ.get("FAKE_ERROR") == "library":
    raise OSError("PortAudio library not found")


class PortAudioError(Exception):
    pass


class Flags:
    def __init__(self, input_overflow: bool) -> None:
        self.input_overflow = input_overflow


def _recording() -> tuple[Any, int]:
    samples, rate = soundfile.read(os.environ["FAKE_MICROPHONE"], dtype="float32", always_2d=True)
    return samples[:, :1], rate


def query_devices(device: Any = None, kind: str | None = None) -> dict[str, Any]:
    assert kind == "input"
    if os.environ.get("FAKE_ERROR") == "none":
        raise PortAudioError("Error querying device -1")
    return {"name": "Fake", "default_samplerate": float(_recording()[1])}


class InputStream:
    def __init__(
        self,
        samplerate: int,
        blocksize: int,
        channels: int,
        dtype: str,
        callback: Callable[..., None],
        finished_callback: Callable[[], None],
    ) -> None:
        if os.environ.get("FAKE_ERROR") == "busy":
            raise PortAudioError("Error opening InputStream: Device unavailable", -9985)
        self._samples, rate = _recording()
        assert (samplerate, channels, dtype) == (rate, 1, "float32")
        self._block, self._callback, self._finished = blocksize, callback, finished_callback
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._play, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, ignore_errors: bool = True) -> None:
        self._closed.set()
        self._thread.join(10)

    def _play(self) -> None:
        overflow = int(os.environ.get("FAKE_OVERFLOW", -1))
        for number, start in enumerate(range(0, len(self._samples), self._block)):
            self._send(self._samples[start : start + self._block], number == overflow)
        then = os.environ.get("FAKE_THEN", "silence")
        hum = np.random.default_rng(1).standard_normal((self._block, 1)).astype(np.float32) * 1e-4
        while then == "silence" and not self._closed.wait(0.005):
            self._send(hum, False)
        if then != "stall":
            self._finished()

    def _send(self, block: Any, overflow: bool) -> None:
        if not self._closed.is_set():
            self._callback(block, len(block), None, Flags(overflow))
