"""A voice: which program speaks, what it is given, and that it is quiet when told."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import DummyInput
from prompt_toolkit.output import DummyOutput

from phimlx.errors import PhimlxError
from phimlx.generation.reply import Chunk
from phimlx.terminal.output import Output
from phimlx.terminal.screen import TerminalScreen
from phimlx.terminal.speaker import OTHERS, Program, Speaker, find_program
from tests.terminal.fake_phi import INTERRUPT, FakePhi, Script
from tests.terminal.test_chat import chat

DEADLINE = 60.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Voices:
    """Programs that write down what they are given, in place of all others."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.log = folder / "bin", folder / "log"
        self.folder.mkdir()
        for name in ("cat", "sleep", "sh"):
            (self.folder / name).symlink_to(f"/bin/{name}")
        patch.setenv("PATH", str(self.folder))
        patch.setattr("sys.platform", "linux")

    def install(self, name: str, more: str = "cat >> $LOG; echo '|' >> $LOG") -> None:
        path = self.folder / name
        path.write_text(f'#!/bin/sh\nLOG={self.log}\necho "{name} $*" >> $LOG\n{more}\n')
        path.chmod(0o755)

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def voices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Voices:
    return Voices(tmp_path, monkeypatch)


def test_nothing_that_speaks(voices: Voices, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PhimlxError) as raised:
        find_program()
    assert str(raised.value) == (
        "Nothing here reads text aloud: neither spd-say, espeak-ng nor espeak is installed."
    )
    assert raised.value.hint == (
        "Install one, on Debian and Ubuntu with: sudo apt install espeak-ng"
    )
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(PhimlxError, match="say is not installed"):
        find_program()


@pytest.mark.parametrize("name", ["espeak", "espeak-ng"])
def test_the_text_goes_by_stdin(name: str, voices: Voices) -> None:
    voices.install(name)
    speaker = Speaker()
    speaker.hear(Chunk("-w /tmp/x is no option. And", 1, "text"))
    speaker.hear(Chunk("Not said.", 2, "reasoning"))
    speaker.hear(Chunk(" this.", 3, "text"))
    speaker.end()
    speaker.wait()
    assert voices.said == (
        f"{name} --stdin\n-w /tmp/x is no option.|\n{name} --stdin\nAnd this.|\n"
    )
    assert speaker.failure is None


def test_a_mac_speaks_with_say(voices: Voices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    voices.install("say")
    speaker = Speaker()
    speaker.hear(Chunk("Hello.", 1, "text"))
    speaker.end()
    speaker.wait()
    assert voices.said == "say -f -\nHello.|\n"


def test_an_argument_is_no_option(voices: Voices) -> None:
    voices.install("spd-say")
    voices.install("espeak-ng")
    speaker = Speaker()
    assert speaker.program is OTHERS[0]
    speaker.hear(Chunk("--cancel `!-!x` says", 1, "text"))
    speaker.end()
    speaker.wait()
    assert voices.said == "spd-say --wait -- --cancel !-!x says\n|\n"


def test_it_is_quiet_at_once(voices: Voices) -> None:
    voices.install("spd-say", '[ "$1" = --cancel ] || exec sleep 60')
    speaker = Speaker()
    speaker.hear(Chunk("One. Two. Three. Four", 1, "text"))
    until(lambda: "One." in voices.said)
    speaker.stop()
    speaker.end()
    speaker.wait()
    assert voices.said == "spd-say --wait -- One.\nspd-say --cancel\n"
    assert speaker.failure is None


def test_one_that_fails_is_told_once(voices: Voices) -> None:
    voices.install("espeak", "exit 3")
    speaker = Speaker()
    speaker.hear(Chunk("One. Two. Three.", 1, "text"))
    speaker.end()
    speaker.wait()
    assert speaker.failure == "espeak cannot speak: it ended with code 3."
    assert voices.said == "espeak --stdin\n"
    voices.install("espeak-ng", "echo 'ALSA lib: no' >&2; echo 'error: No such device' >&2")
    mute = Speaker()
    mute.hear(Chunk("One. Two. Three.", 1, "text"))
    mute.end()
    mute.wait()
    assert mute.failure == "espeak-ng cannot speak: error: No such device."
    gone = Speaker(Program("no-such-program", ()))
    gone.hear(Chunk("One. Two.", 1, "text"))
    gone.end()
    gone.wait()
    assert gone.failure == "no-such-program cannot be run: No such file or directory."


def test_a_chat_reads_its_answers(voices: Voices, capsys: pytest.CaptureFixture[str]) -> None:
    voices.install("espeak")
    script = Script([("reasoning", "Hm. "), "It is **4.** ", "Or so:\n```\n2 + 2\n```\n"])
    phi = FakePhi(script, "Not read.")
    chat(phi, "/speak", "/speak on", "2 + 2?", "/speak off", "again", interactive=False)
    assert voices.said == "espeak --stdin\nIt is 4.|\nespeak --stdin\nOr so:|\n"
    told = capsys.readouterr().err
    assert told == "No voice.\nAnswers are read aloud by espeak.\nNo voice.\n"


def test_a_voice_that_fails_ends_no_chat(
    voices: Voices, capsys: pytest.CaptureFixture[str]
) -> None:
    voices.install("espeak", "exit 3")
    chat(FakePhi("One.", "Two."), "/speak on", "a", "b", interactive=False)
    assert capsys.readouterr().err == (
        "Answers are read aloud by espeak.\n"
        "Warning: espeak cannot speak: it ended with code 3. Answers are read aloud no more.\n"
    )


def test_the_next_question_and_the_end_stop_it(voices: Voices) -> None:
    voices.install("espeak", "exec sleep 60")
    chat(FakePhi("One.", "Two."), "/speak on", "a", "b")
    assert voices.said.splitlines() in (["espeak --stdin"], ["espeak --stdin"] * 2, [])


def test_ctrl_c_in_a_reply_stops_it(voices: Voices) -> None:
    voices.install("espeak", "exec sleep 60")
    phi = FakePhi(Script(["One. Two. Three", INTERRUPT, " four. Five."]))
    chat(phi, "/speak on", "count", "/stats")
    assert voices.said in ("", "espeak --stdin\n")


def test_ctrl_c_at_the_prompt_stops_the_voice_first(
    voices: Voices, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    voices.install("espeak", "exec sleep 60")
    held = chat(FakePhi("One."), "/speak on", "count")
    speaker = held.voice._speaker
    assert speaker is not None
    with create_app_session(input=DummyInput(), output=DummyOutput()):
        screen = TerminalScreen(Output(), lambda line: [])
    keys = iter([None, None, None, "next"])

    def read() -> str:
        key = next(keys)
        if key is None:
            raise KeyboardInterrupt
        return key

    monkeypatch.setattr(screen._line, "read", read)
    screen.on_interrupt = held.voice.hush
    speaker.hear(Chunk("Two. Three. Four", 1, "text"))
    until(lambda: voices.said.count("espeak") >= 1 and speaker.is_speaking)
    capsys.readouterr()
    assert screen.read() == "next"
    speaker.wait()
    assert capsys.readouterr().err == "Ctrl-D leaves.\n"


def test_what_speak_takes(voices: Voices, capsys: pytest.CaptureFixture[str]) -> None:
    chat(FakePhi(), "/speak loudly", "/speak on")
    told = capsys.readouterr().err
    assert "Error: Shall answers be read aloud?\nHint: Say /speak on, or /speak off.\n" in told
    assert "Error: Nothing here reads text aloud" in told
