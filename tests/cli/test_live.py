"""`phimlx transcribe --live`: subtitles of a microphone, which the fake device plays."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from phimlx.cli.group import cli
from phimlx.media.audio_file import AudioStream
from phimlx.media.speech import split_live
from phimlx.transcription import TranscriptSegment
from tests.media.microphones import plug_in, recording
from tests.terminal.fake_phi import FakePhi

SPEECH = recording(0.5, 1.5, 1.5, 2.0, 1.5)
SRT = (
    "1\n00:00:00,500 --> 00:00:02,000\nPiece one.\n\n",
    "2\n00:00:03,500 --> 00:00:05,500\nPiece two.\n\n",
)
LISTENED = [
    "Listening; Ctrl-C ends it.",
    "Writing down the last words; Ctrl-C does without them.",
]


class LivePhi(FakePhi):
    """Understands each piece as its number; Ctrl-C comes while it listens to the last."""

    takes_media = hears = True
    names = ("one", "two")
    interrupts_at: int | None = 2
    target: Path | None = None

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.asked: dict[str, Any] = {}

    def transcribe(self, sound: AudioStream, **options: Any) -> Iterator[TranscriptSegment]:
        self.asked = options
        for number, segment in enumerate(split_live(sound, options["segment_seconds"]), 1):
            if self.target is not None and self.target.exists():
                self.seen.append(self.target.read_text())
            if number == self.interrupts_at:
                signal.raise_signal(signal.SIGINT)
            yield TranscriptSegment(
                segment.start,
                segment.end,
                f"Piece {self.names[number - 1]}\x07.",
                spoken=segment.spoken,
                quiet_until=segment.quiet_until,
            )


class Live:
    """Runs `phimlx transcribe --live` beside a microphone that plays `SPEECH`."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.phi: FakePhi = LivePhi()
        self._folder, self._patch = folder, patch
        patch.chdir(folder)
        patch.setattr("phimlx.api.load", lambda *arguments, **options: self.phi)

    def __call__(self, *arguments: str, samples: Any = SPEECH, **device: str) -> Result:
        plug_in(self._patch, self._folder, samples, 16_000, **device)
        arguments = ("transcribe", "--live", *arguments)
        return CliRunner().invoke(cli, arguments, prog_name="phimlx")


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Live:
    return Live(tmp_path, monkeypatch)


def told(result: Result) -> list[str]:
    """What was said beside the transcript, without how long it took."""
    return [line for line in result.stderr.splitlines() if not line.startswith("Listened for 0:")]


def test_subtitles_come_as_they_are_spoken_until_ctrl_c(live: Live) -> None:
    result = live("--format", "srt")
    assert (result.exit_code, result.stdout) == (0, "".join(SRT))
    assert told(result) == LISTENED
    assert isinstance(live.phi, LivePhi)
    assert live.phi.asked == {
        "prompt": None,
        "translate_to": None,
        "segment_seconds": 30.0,
        "kv_bits": None,
    }


def test_the_file_is_whole_after_every_piece(live: Live) -> None:
    assert isinstance(live.phi, LivePhi)
    live.phi.target = Path("talk.srt")
    result = live("-o", "talk.srt")
    assert (result.exit_code, result.stdout) == (0, "")
    assert Path("talk.srt").read_text() == "".join(SRT)
    assert live.phi.seen == [SRT[0]]
    assert told(result) == [*LISTENED, "Wrote talk.srt."]


def test_json_is_one_object(live: Live) -> None:
    result = live("--json")
    assert result.exit_code == 0
    (found,) = json.loads(result.stdout)["files"]
    assert (found["file"], found["complete"], found["error"]) == ("microphone", True, None)
    assert [each["text"] for each in found["segments"]] == ["Piece one\x07.", "Piece two\x07."]


def test_a_second_ctrl_c_does_not_wait_for_the_last_words(live: Live) -> None:
    class Hurried(LivePhi):
        def transcribe(self, sound: AudioStream, **options: Any) -> Iterator[TranscriptSegment]:
            for piece in super().transcribe(sound, **options):
                if "two" in piece.text:
                    signal.raise_signal(signal.SIGINT)
                yield piece

    live.phi = Hurried()
    result = live("-o", "talk.srt")
    assert result.exit_code == 130
    assert Path("talk.srt").read_text() == SRT[0]
    assert result.stderr.splitlines()[-1] == ("Stopped: microphone is written down up to 0:02.")


@pytest.mark.parametrize("then", ["unplug", "stall"])
def test_a_microphone_that_goes_away_keeps_what_was_said(
    then: str, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phimlx.media.microphone.STALL_SECONDS", 0.3)
    assert isinstance(live.phi, LivePhi)
    live.phi.interrupts_at = None
    result = live("-o", "talk.srt", then=then)
    assert (result.exit_code, result.stdout) == (1, "")
    assert Path("talk.srt").read_text() == "".join(SRT)
    assert result.stderr.splitlines()[-2:] == [
        "Error: The microphone is gone: it sends no more sound.",
        "Hint: Was it unplugged, or switched over? Connect it and begin again.",
    ]


def test_no_microphone_is_told_in_one_sentence(live: Live) -> None:
    result = live(error="none")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: There is no microphone.\nHint: Connect")


def test_lost_sound_and_one_that_hears_nothing_are_told(live: Live) -> None:
    result = live("--format", "srt", overflow="12")
    assert "Warning: about 0.1 s of sound were lost before 0:0" in result.stderr
    silent = recording(12.0, 2.0, 1.5, hum=0.0)
    live.phi = LivePhi()
    live.phi.interrupts_at = 1
    result = live(samples=silent)
    assert result.exit_code == 0
    assert "Warning: The microphone sends nothing but silence." in result.stderr


def test_a_model_that_does_not_hear(live: Live) -> None:
    live.phi = FakePhi()
    result = live()
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: fake reads text alone: it takes no pictures or sounds.\n"
        "Hint: Use nano-multimodal, which comes along, or phi-4-multimodal.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["a.wav"], "--live hears the microphone: it takes no FILE."),
        (["--output-dir", "x"], "--output-dir is for files, not for --live."),
        (["--max-seconds", "5"], "--max-seconds is for files, not for --live."),
    ],
)
def test_what_is_for_files(arguments: list[str], error: str, live: Live) -> None:
    result = live(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == f"Error: {error}"
