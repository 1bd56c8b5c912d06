"""`/record` in a chat: what ends a clip, what becomes of it, and what cannot be recorded."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]

from phimlx.errors import MediaError, PhimlxError
from phimlx.media.audio import load_audio
from phimlx.terminal.output import Output
from phimlx.terminal.recording import meter, record_clip
from tests.cli.terminal import CTRL_C, ENTER, Terminal
from tests.cli.test_terminal import leave, open_chat
from tests.media.microphones import FAKE_DEVICE, device_environment, plug_in, recording
from tests.terminal.fake_phi import FakePhi
from tests.terminal.test_chat import chat


class Hearing(FakePhi):
    takes_media = hears = True


def with_microphone(
    folder: Path, replies: list[Any], samples: Any, rate: int = 44_100, **device: str
) -> Terminal:
    """A chat beside a microphone that plays samples."""
    environment = device_environment(folder, samples, rate, **device)
    return open_chat(folder, replies, PYTHONPATH=str(FAKE_DEVICE), **environment)


def clips(folder: Path) -> list[Path]:
    return sorted((folder / "state" / "phimlx" / "recorded").glob("*"))


@pytest.mark.slow
def test_silence_ends_a_clip_and_the_model_hears_it(tmp_path: Path) -> None:
    samples = recording(1.0, 2.0, rate=44_100)
    with with_microphone(tmp_path, ["Heard.", "Again."], samples) as terminal:
        terminal.type("/record What is said?", ENTER)
        terminal.expect("● 0:0")
        terminal.expect("█")
        terminal.expect("Recorded 2.5 s.")
        terminal.expect("Heard.")
        terminal.expect("> ")
        terminal.type(f"/save {tmp_path / 'saved.json'}", ENTER)
        terminal.expect("Saved to")
        leave(terminal)
    (clip,) = clips(tmp_path)
    assert stat.S_IMODE(clip.stat().st_mode) == 0o600
    assert soundfile.info(clip).samplerate == 16_000
    expected = load_audio((samples, 44_100)).samples
    found = soundfile.read(clip, dtype="float32")[0]
    heard = found[: 2 * 16_000]
    begins = range(round(0.7 * 16_000), round(0.8 * 16_000), 160)
    differences = [np.abs(heard - expected[at : at + len(heard)]).max() for at in begins]
    assert min(differences) < 1e-4
    saved = (tmp_path / "saved.json").read_text()
    assert clip.name in saved
    assert "What is said?" in saved


@pytest.mark.slow
def test_a_key_ends_it_and_ctrl_c_drops_it(tmp_path: Path) -> None:
    """Of one who never pauses."""
    samples = recording(0.5, 200.0, rate=16_000)
    with with_microphone(tmp_path, ["Heard."], samples, 16_000, then="silence") as terminal:
        terminal.type("/record", ENTER)
        terminal.expect("● 0:0")
        terminal.type(CTRL_C)
        terminal.expect("Dropped what was recorded.")
        terminal.expect("> ")
        assert clips(tmp_path) == []
        assert terminal.raw.count("Traceback") == 0
        terminal.type("/record", ENTER)
        terminal.expect("● 0:02")
        terminal.type(" ")
        terminal.expect("Recorded ")
        terminal.expect("Heard.")
        leave(terminal)
    assert len(clips(tmp_path)) == 1


@pytest.mark.slow
def test_one_that_is_unplugged_keeps_what_was_said(tmp_path: Path) -> None:
    samples = recording(0.5, 1.5, 0.5, rate=16_000)
    with with_microphone(tmp_path, ["Heard."], samples, 16_000, then="unplug") as terminal:
        terminal.type("/record", ENTER)
        terminal.expect("With your next message: sound recorded-")
        terminal.expect("Error: The microphone is gone: it sends no more sound.")
        terminal.expect("> ")
        terminal.type(ENTER)
        terminal.expect("Heard.")
        leave(terminal)


@pytest.mark.parametrize(
    ("samples", "error"),
    [
        (recording(12.0), "Nobody was heard."),
        (recording(2.0, 0.05, 12.0), "Nobody was heard."),
        (np.zeros(12 * 16_000, np.float32), "The microphone sends nothing but silence."),
    ],
)
def test_one_that_hears_nobody(
    samples: Any, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, tmp_path, samples, 16_000)
    monkeypatch.setattr("phimlx.terminal.recording._keys", no_keys)
    with pytest.raises(MediaError) as raised:
        record_clip(Output(), 60.0)
    assert str(raised.value) == error


def test_a_clip_is_no_longer_than_sounds_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, tmp_path, recording(0.5, 60.0), 16_000)
    monkeypatch.setattr("phimlx.terminal.recording._keys", no_keys)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    clip = record_clip(Output(), 5.0)
    assert clip.failure is None
    assert load_audio(clip.path).seconds == pytest.approx(4.75, abs=0.06)


@contextmanager
def no_keys() -> Iterator[Callable[[], bool]]:
    """Nobody at the terminal."""
    yield lambda: False


@pytest.mark.parametrize(
    ("phi", "interactive", "error", "hint"),
    [
        (
            FakePhi(),
            True,
            "fake reads text alone: it takes no pictures or sounds.",
            "Use nano-multimodal, which comes along, or phi-4-multimodal.",
        ),
        (
            Hearing(),
            True,
            "There is no microphone.",
            "Connect one, or choose it as input in the system's sound settings.",
        ),
    ],
)
def test_what_cannot_be_recorded(
    phi: FakePhi,
    interactive: bool,
    error: str,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plug_in(monkeypatch, tmp_path, recording(1.0), 16_000, error="none")
    chat(phi, "/record", interactive=interactive)
    assert capsys.readouterr().err == f"Error: {error}\nHint: {hint}\n"


def test_a_pipe_has_no_key_that_ends_it() -> None:
    with pytest.raises(PhimlxError, match="needs a terminal, at which a key ends it"):
        chat(Hearing(), "/record", interactive=False)


@pytest.mark.parametrize(
    ("loud", "bars"), [(0.0, 0), (1e-4, 0), (10**-1.5, 10), (0.5, 18), (1.0, 20), (8.0, 20)]
)
def test_the_meter_tells_decibels(loud: float, bars: int) -> None:
    assert meter(np.full(800, loud, np.float32)) == "█" * bars + "·" * (20 - bars)
