"""A microphone: its blocks at the model's rate, and each way in which there is none."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phimlx.errors import MediaError
from phimlx.media import microphone as microphones
from phimlx.media.audio import load_audio
from phimlx.media.microphone import open_microphone
from tests.media.microphones import plug_in, recording
from tests.media.sounds import noise


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 48_000])
def test_what_is_heard_is_what_a_file_would_be(
    rate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = noise(1.3, rate)
    plug_in(monkeypatch, tmp_path, samples, rate, then="unplug")
    heard: list[Any] = []
    with open_microphone() as microphone, pytest.raises(MediaError, match="microphone is gone"):
        heard.extend(microphone.sound.blocks)
    whole = load_audio((samples, rate))
    assert microphone.sound.rate == whole.rate
    assert np.array_equal(np.concatenate(heard), whole.samples)
    assert microphone.lost == 0


def test_stopped_it_ends_with_what_was_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, tmp_path, noise(1.0), 16_000)
    with open_microphone() as microphone:
        first = list(itertools.islice(microphone.sound.blocks, 10))
        deadline = time.monotonic() + 60
        while microphone.waiting < 0.5 and time.monotonic() < deadline:
            pass
        microphone.stop()
        rest = list(microphone.sound.blocks)
    assert sum(map(len, first)) == 8000
    assert sum(map(len, rest)) >= 8000


def test_lost_sound_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, tmp_path, noise(1.0), 16_000, overflow="3")
    with open_microphone() as microphone:
        list(itertools.islice(microphone.sound.blocks, 15))
        assert microphone.lost == 0.05


def test_what_nobody_reads_is_not_kept_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(microphones, "WAITING_SECONDS", 0.5)
    plug_in(monkeypatch, tmp_path, noise(2.0), 16_000, then="unplug")
    with open_microphone() as microphone:
        deadline = time.monotonic() + 60
        while microphone.lost < 1.4 and time.monotonic() < deadline:
            pass
        with pytest.raises(MediaError):
            list(microphone.sound.blocks)
    assert microphone.lost == pytest.approx(1.45, abs=0.1)


@pytest.mark.parametrize("then", ["unplug", "stall"])
def test_one_that_goes_away_is_told(
    then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(microphones, "STALL_SECONDS", 0.2)
    plug_in(monkeypatch, tmp_path, noise(1.0), 16_000, then=then)
    with open_microphone() as microphone, pytest.raises(MediaError) as raised:
        list(microphone.sound.blocks)
    assert str(raised.value) == "The microphone is gone: it sends no more sound."
    hint = "Was it unplugged, or switched over? Connect it and begin again."
    assert raised.value.hint == hint


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (
            "library",
            "The microphone needs PortAudio, which is not installed.",
            "Install it, on Debian and Ubuntu with: sudo apt install libportaudio2",
        ),
        (
            "none",
            "There is no microphone.",
            "Connect one, or choose it as input in the system's sound settings.",
        ),
        (
            "busy",
            "The microphone cannot be opened: 'Error opening InputStream: Device unavailable'.",
            "Close other programs that record, or choose another input in the system's sound "
            "settings.",
        ),
    ],
)
def test_where_there_is_none(
    error: str, message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    plug_in(monkeypatch, tmp_path, recording(1.0), 16_000, error=error)
    with pytest.raises(MediaError) as raised, open_microphone():
        raise AssertionError
    assert (str(raised.value), raised.value.hint) == (message, hint)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(MediaError) as raised, open_microphone():
        raise AssertionError
    assert str(raised.value) == "The microphone needs sounddevice, which is not installed."
    assert raised.value.hint is not None
    assert "phimlx[voice]" in raised.value.hint
