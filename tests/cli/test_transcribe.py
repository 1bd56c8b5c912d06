"""`phimlx transcribe`: where transcripts go and how, and what bad files or Ctrl-C leave."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
from click.testing import CliRunner, Result

from phimlx.cli.group import cli
from phimlx.errors import MediaError
from phimlx.hub.resolve import NANO_MULTIMODAL
from phimlx.media.subtitles import FORMATS
from phimlx.transcription import TranscriptSegment
from tests.media.sounds import av_video
from tests.terminal.fake_phi import FakePhi

HELLO = [
    TranscriptSegment(0.0, 2.5, "Hello\x1b[2J there."),
    TranscriptSegment(2.5, 4.0, ""),
    TranscriptSegment(4.0, 61.25, "Bye.", spoken=((4.5, 5.0),)),
]

PRINTABLE = [replace(piece, text=piece.text.replace("\x1b", "")) for piece in HELLO]


class HearingPhi(FakePhi):
    """Hears what is scripted for a file's name; an exception among the pieces is raised there."""

    takes_media = hears = True

    def __init__(self, scripts: dict[str, list[Any]]) -> None:
        super().__init__()
        self.scripts = scripts
        self.heard: list[Any] = []

    def transcribe(
        self, source: Any, on_open: Callable[[float | None], None], **options: Any
    ) -> Iterator[TranscriptSegment]:
        name = source if isinstance(source, str) else source.read().decode()
        self.heard.append((Path(name).name, options))
        on_open(62.0)
        for item in self.scripts[Path(name).name]:
            if not isinstance(item, TranscriptSegment):
                raise item
            yield item


class Transcribe:
    """Runs `phimlx transcribe` in a folder of recordings."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hearing = HearingPhi(
            {
                "a.wav": HELLO,
                "b.wav": [TranscriptSegment(0, 1, "B.")],
                "bad.wav": [
                    TranscriptSegment(0, 1, "So far."),
                    MediaError("bad.wav is damaged.", "Copy it."),
                ],
                "stopped.wav": [TranscriptSegment(0, 1, "So far."), KeyboardInterrupt()],
                "silent.wav": [],
                "loop.wav": [
                    TranscriptSegment(0, 1, "La", "loop"),
                    TranscriptSegment(1, 30, "Lo", "length"),
                ],
                "nameless.wav": [MediaError("The data is no sound.")],
            }
        )
        self.phi: FakePhi = self.hearing
        for name in self.hearing.scripts:
            (folder / name).touch()
        self.sources: list[Any] = []
        monkeypatch.chdir(folder)
        monkeypatch.setattr("phimlx.api.load", self._load)

    def _load(self, source: Any = None, adapter: Any = None, dtype: Any = None) -> FakePhi:
        self.sources.append(source)
        return self.phi

    def __call__(self, *arguments: str, piped: bytes | None = None) -> Result:
        return CliRunner().invoke(cli, ["transcribe", *arguments], input=piped, prog_name="phimlx")


@pytest.fixture
def transcribe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Transcribe:
    return Transcribe(tmp_path, monkeypatch)


TXT = "Hello[2J there.\nBye.\n"
SRT = (
    "1\n00:00:00,000 --> 00:00:02,500\nHello[2J there.\n\n"
    "2\n00:00:04,500 --> 00:00:05,500\nBye.\n\n"
)
VTT = (
    "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nHello[2J there.\n"
    "\n00:00:04.500 --> 00:00:05.500\nBye.\n"
)
JSON = (
    '{"segments": [\n  {"start": 0.0, "end": 2.5, "text": "Hello[2J there."},'
    '\n  {"start": 4.0, "end": 61.25, "text": "Bye."}\n]}\n'
)


@pytest.mark.parametrize(
    ("name", "text"), [("txt", TXT), ("srt", SRT), ("vtt", VTT), ("json", JSON)]
)
def test_every_format_on_stdout_and_in_a_file(name: str, text: str, transcribe: Transcribe) -> None:
    result = transcribe("a.wav", "--format", name)
    assert (result.exit_code, result.stdout, result.stderr) == (0, text, "")
    result = transcribe("a.wav", "--format", name, "-o", "out")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "Wrote out.\n")
    assert Path("out").read_text() == text


def test_options_reach_the_model(transcribe: Transcribe) -> None:
    transcribe("a.wav")
    transcribe("a.wav", "--model", "x", "--translate-to", "French", "--segment-seconds", "12")
    limited = ("--max-bytes", "5", "--max-seconds", "60")
    transcribe("a.wav", "--prompt", "Who?", *limited, "--kv-bits", "8")
    assert transcribe.sources == ["phi-4-multimodal", "x", "phi-4-multimodal"]
    heard = [options for _, options in transcribe.hearing.heard]
    limits = [options.pop("limits") for options in heard]
    assert [options.pop("kv_bits") for options in heard] == [None, None, 8]
    assert heard == [
        {"prompt": None, "translate_to": None, "segment_seconds": 30.0},
        {"prompt": None, "translate_to": "French", "segment_seconds": 12.0},
        {"prompt": "Who?", "translate_to": None, "segment_seconds": 30.0},
    ]
    assert [each.max_seconds for each in limits] == [float("inf"), float("inf"), 60]
    assert [each.max_bytes for each in limits] == [10**9, 10**9, 5]


def test_several_files_are_told_apart_and_a_bad_one_stops_no_other(
    transcribe: Transcribe,
) -> None:
    result = transcribe("none.wav", "bad.wav", "nameless.wav", "a.wav", "silent.wav", "b.wav")
    assert result.exit_code == 1
    assert result.stdout == (
        "==> bad.wav <==\nSo far.\n"
        "\n==> nameless.wav <==\n"
        f"\n==> a.wav <==\n{TXT}"
        "\n==> silent.wav <==\n"
        "\n==> b.wav <==\nB.\n"
    )
    assert result.stderr == (
        "Error: There is no file none.wav.\nHint: Check the path.\n"
        "Error: bad.wav is damaged.\nHint: Copy it.\n"
        "Error: nameless.wav: The data is no sound.\n"
    )


def test_no_model_is_loaded_where_no_file_is_there(transcribe: Transcribe) -> None:
    result = transcribe("none.wav", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "model": "phi-4-multimodal",
        "files": [
            {
                "file": "none.wav",
                "text": "",
                "segments": [],
                "until": 0.0,
                "complete": False,
                "error": "There is no file none.wav.",
            }
        ],
        "error": {"message": "There is no file none.wav.", "hint": "Check the path."},
    }
    assert transcribe.sources == []


def test_json_is_one_object_and_nothing_else(transcribe: Transcribe) -> None:
    result = transcribe("a.wav", "bad.wav", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["model"] == "fake"
    assert told["files"][0] == {
        "file": "a.wav",
        "text": "Hello\x1b[2J there. Bye.",
        "segments": [
            {"start": 0.0, "end": 2.5, "text": "Hello\x1b[2J there.", "finish_reason": "stop"},
            {"start": 2.5, "end": 4.0, "text": "", "finish_reason": "stop"},
            {"start": 4.0, "end": 61.25, "text": "Bye.", "finish_reason": "stop"},
        ],
        "until": 61.25,
        "complete": True,
        "error": None,
    }
    assert told["files"][1]["text"] == "So far."
    assert (told["files"][1]["complete"], told["files"][1]["error"]) == (
        (False, "bad.wav is damaged.")
    )
    assert "\x1b" not in result.stdout


def test_a_folder_gets_a_file_for_each(transcribe: Transcribe) -> None:
    arguments = ("a.wav", "bad.wav", "nameless.wav", "silent.wav", "--output-dir", "out/x")
    result = transcribe(*arguments, "--format", "vtt")
    assert (result.exit_code, result.stdout) == (1, "")
    written = {path.name: path.read_text() for path in Path("out/x").iterdir()}
    assert written == {
        "a.vtt": VTT,
        "bad.vtt": "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nSo far.\n",
        "silent.vtt": "WEBVTT\n",
    }
    refused = transcribe(*arguments, "--format", "vtt")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "Error: out/x/a.vtt exists already; --overwrite replaces it.\n" in refused.stderr
    assert transcribe(*arguments, "--format", "vtt", "--overwrite").exit_code == 1


@pytest.mark.parametrize("form", ["stdout", "file", "json"])
def test_ctrl_c_keeps_what_has_come(form: str, transcribe: Transcribe) -> None:
    flags = {"stdout": ["--format", "vtt"], "file": ["-o", "out"], "json": ["--json"]}[form]
    result = transcribe("stopped.wav", *flags)
    assert result.exit_code == 130
    wrote = "Wrote out.\n" if form == "file" else ""
    stopped = "Stopped: stopped.wav is written down up to 0:01 of 1:02.\n"
    assert result.stderr == wrote + stopped
    if form == "stdout":
        assert result.stdout == "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nSo far.\n"
    elif form == "file":
        assert Path("out").read_text() == "So far.\n"
    else:
        told = json.loads(result.stdout)["files"][0]
        assert (told["text"], told["complete"], told["error"]) == ("So far.", False, None)
        assert told["until"] == 1.0


def test_ctrl_c_before_the_first_piece(transcribe: Transcribe) -> None:
    transcribe.hearing.scripts["silent.wav"] = [KeyboardInterrupt()]
    result = transcribe("silent.wav", "-o", "out")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "Stopped before anything of silent.wav was understood.\n"
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["txt", "srt", "vtt", "json"])
def test_the_file_is_whole_after_every_piece(name: str, transcribe: Transcribe) -> None:
    seen: list[str] = []

    def look(source: Any, on_open: Any, **options: Any) -> Iterator[TranscriptSegment]:
        for piece in HELLO:
            yield piece
            seen.append(Path("out").read_text())

    transcribe.hearing.transcribe = look  # type: ignore[method-assign]
    assert transcribe("a.wav", "--format", name, "-o", "out").exit_code == 0
    assert seen == [FORMATS[name].write(PRINTABLE[:count]) for count in (1, 2, 3)]
    assert [path.name for path in Path().iterdir() if path.name.startswith((".", "out"))] == ["out"]


def test_stdin_is_a_file(transcribe: Transcribe) -> None:
    result = transcribe("-", piped=b"b.wav")
    assert (result.exit_code, result.stdout) == (0, "B.\n")
    assert transcribe("-", "--output-dir", "out", piped=b"b.wav").exit_code == 0
    assert Path("out/stdin.txt").read_text() == "B.\n"


def test_what_is_wrong_with_stdin_is_said_of_it(transcribe: Transcribe) -> None:
    result = transcribe("-", "b.wav", piped=b"nameless.wav")
    assert (result.exit_code, result.stdout) == (1, "==> stdin <==\n\n==> b.wav <==\nB.\n")
    assert result.stderr == "Error: stdin: The data is no sound.\n"


def test_a_transcript_that_cannot_be_written_is_shown(
    transcribe: Transcribe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phimlx.terminal.transcripts.write_file", full)
    result = transcribe("a.wav", "-o", "out")
    assert (result.exit_code, result.stdout) == (1, TXT)
    assert result.stderr == (
        "Warning: The disk is full: out could not be written. It is tried again.\n"
        "Error: a.wav: The disk is full: out could not be written.\n"
        "Hint: Free some space, then try again.\n"
    )


def test_an_answer_that_was_cut_is_told(transcribe: Transcribe) -> None:
    result = transcribe("loop.wav")
    assert (result.exit_code, result.stdout) == (0, "La\nLo\n")
    assert result.stderr == (
        "Warning: loop.wav, from 0.0 to 1.0 s: the text repeated itself: what came after the "
        "first time is left out.\n"
        "Warning: loop.wav, from 1.0 to 30.0 s: the text was cut for its length: it may be "
        "incomplete.\n"
    )


def test_a_model_that_does_not_hear_says_so_once(transcribe: Transcribe) -> None:
    transcribe.phi = FakePhi()
    result = transcribe("a.wav", "b.wav")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: fake reads text alone: it takes no pictures or sounds.\n"
        "Hint: Use nano-multimodal, which comes along, or phi-4-multimodal.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "Missing argument 'FILE...'; --live hears the microphone."),
        (
            ["a.wav", "-o", "x", "--output-dir", "y"],
            "The transcript goes to --output or into --output-dir, not both.",
        ),
        (
            ["a.wav", "b.wav", "-o", "x"],
            "--output takes one recording; --output-dir takes several.",
        ),
        (
            ["a.wav", "b.wav", "--format", "srt"],
            "Several transcripts on stdout would be no srt; add --output-dir FOLDER.",
        ),
        (["-", "-"], "stdin (-) can be read once."),
        (
            ["a.wav", "x/a.flac", "--output-dir", "y"],
            "a.wav and x/a.flac would both be written to y/a.txt.",
        ),
        (["a.wav", "-o", "b.wav"], "b.wav exists already; --overwrite replaces it."),
        (["a.wav", "-o", "no/x"], "There is no folder no to write to."),
        (
            ["a.wav", "--segment-seconds", "50"],
            "Invalid value for '--segment-seconds': 50.0 is not in the range 1<=x<=40.",
        ),
        (
            ["a.wav", "--format", "doc"],
            "Invalid value for '--format': 'doc' is not one of 'txt', 'srt', 'vtt', 'json'.",
        ),
    ],
)
def test_wrong_usage(arguments: list[str], error: str, transcribe: Transcribe) -> None:
    result = transcribe(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "Usage: phimlx transcribe [OPTIONS] FILE...\n"
        f"Try 'phimlx transcribe --help' for help.\n\nError: {error}\n"
    )
    assert transcribe.sources == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["--prompt", "a", "--translate-to", "b"],
            "A prompt and a language to translate to were given; one of them says what to do.",
        ),
        (["--translate-to", ""], "The language is empty."),
        (["--output-dir", "a.wav/x"], "a.wav/x cannot be made: Not a directory."),
    ],
)
def test_what_cannot_be_done_is_said_first(
    arguments: list[str], error: str, transcribe: Transcribe
) -> None:
    result = transcribe("a.wav", *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[0] == f"Error: {error}"
    assert transcribe.sources == []


def test_names_hold_nothing_that_a_terminal_obeys(
    transcribe: Transcribe, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("\x1b[2Jc.wav").touch()
    transcribe.hearing.scripts["\x1b[2Jc.wav"] = [TranscriptSegment(0, 1, "C.")]
    result = transcribe("\x1b[2Jc.wav", "b.wav")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "==> [2Jc.wav <==\nC.\n\n==> b.wav <==\nB.\n"


def test_pieces_beside_the_bar_of_a_terminal(
    transcribe: Transcribe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    result = transcribe("a.wav")
    assert result.exit_code == 0
    assert result.stdout == TXT
    assert "Transcribing a.wav" in result.stderr
    assert "4/62" in result.stderr


@pytest.mark.parametrize(
    ("name", "given", "head"),
    [
        ("a.srt", [], "1\n00:00:00,000 --> "),
        ("a.VTT", [], "WEBVTT\n"),
        ("a.json", [], '{"segments": '),
        ("a.txt", [], "Hello"),
        ("a.md", [], "Hello"),
        ("a", [], "Hello"),
        ("a.srt", ["--format", "txt"], "Hello"),
        ("a.txt", ["--format", "vtt"], "WEBVTT\n"),
    ],
)
def test_a_files_name_tells_the_format_where_no_other_is_given(
    name: str, given: list[str], head: str, transcribe: Transcribe
) -> None:
    assert transcribe("a.wav", "-o", name, *given).exit_code == 0
    assert Path(name).read_text().startswith(head)


@pytest.mark.slow
def test_subtitles_of_a_movie(tmp_path: Path) -> None:
    """The sound of a video, its cues where the words are; a longer one is refused where asked."""
    clips = sorted((NANO_MULTIMODAL / "clips").glob("speech-*"))[1:3]
    sounds = [soundfile.read(clip, dtype="float32")[0] for clip in clips]
    gap = np.zeros(32_000, np.float32)
    movie, spoken = tmp_path / "movie.mp4", [len(sound) / 16_000 for sound in sounds]
    movie.write_bytes(av_video(sound=np.concatenate((sounds[0], gap, sounds[1]))))
    arguments = ["transcribe", "--model", "nano-multimodal", str(movie)]
    result = CliRunner().invoke(cli, [*arguments, "--format", "srt"], prog_name="phimlx")
    assert (result.exit_code, result.stderr) == (0, "")
    times = re.findall(r"00:00:([\d,]+) --> 00:00:([\d,]+)", result.stdout)
    first, second = [tuple(float(time.replace(",", ".")) for time in pair) for pair in times]
    assert first[0] < spoken[0]
    assert first[1] < spoken[0] + 2.0 < second[1]
    assert second[0] == pytest.approx(spoken[0] + 2.0, abs=0.4)
    result = CliRunner().invoke(cli, [*arguments, "--max-seconds", "3"], prog_name="phimlx")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: {movie} is longer than 3 s.\n"
        "Hint: If you trust it, raise the limit with --max-seconds.\n"
    )
