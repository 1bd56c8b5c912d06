"""Pictures, sounds and videos on the command line, with a scripted model and with a tiny one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from phimlx import api, catalog
from phimlx.cli.group import cli
from phimlx.media.limits import Limits
from phimlx.terminal.conversation import Conversation
from tests.media.sounds import av_video, noise, sound_file
from tests.multimodal import multimodal_folder
from tests.terminal.fake_phi import FakePhi, Script


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a picture, a sound and a video."""
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / "cat.png")
    (tmp_path / "hum.wav").write_bytes(sound_file(noise(1.0), 16_000))
    (tmp_path / "clip.mp4").write_bytes(av_video())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def phi(monkeypatch: pytest.MonkeyPatch) -> FakePhi:
    phi = FakePhi(Script(["Hel", "lo."]))
    phi.takes_media = phi.hears = True

    def load(source: Any = None, adapter: Any = None, dtype: Any = None) -> FakePhi:
        phi.sources.append(source)
        return phi

    monkeypatch.setattr("phimlx.api.load", load)
    return phi


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(multimodal_folder(data, tmp_path_factory.mktemp("model")))


def run(*arguments: str, piped: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli, arguments, input=piped, prog_name="phimlx")


def test_media_go_with_the_prompt(files: Path, phi: FakePhi) -> None:
    arguments = ["--image", "cat.png", "--image", "https://x.org/a.png", "--audio", "hum.wav"]
    result = run("generate", *arguments, "--video", "clip.mp4", "--frames", "3", "What?")
    assert (result.exit_code, result.stdout) == (0, "Hello.\n")
    assert phi.prompts == [[{"role": "user", "content": "What?"}]]
    assert phi.sources == ["phi-4-multimodal"]
    assert catalog.find("phi-4-multimodal") is not None
    assert phi.options == [
        {
            "raw": False,
            "tools": None,
            "images": ["cat.png", "https://x.org/a.png"],
            "audio": ["hum.wav"],
            "video": ["clip.mp4"],
            "frames": 3,
            "limits": Limits(),
        }
    ]


def test_limits_can_be_raised(files: Path, phi: FakePhi) -> None:
    flags = {
        "max_pixels": 7,
        "max_aspect": 8.0,
        "max_seconds": 9.0,
        "max_frames": 10,
        "max_bytes": 11,
        "max_download": 12,
    }
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    assert run("generate", "--image", "cat.png", *arguments, "What?").exit_code == 0
    assert phi.options[0]["limits"] == Limits(**flags)  # type: ignore[arg-type]


def test_with_a_sound_the_question_may_be_spoken(files: Path, phi: FakePhi) -> None:
    result = run("generate", "--audio", "hum.wav", piped="never read")
    assert (result.exit_code, result.stdout) == (0, "Hello.\n")
    assert phi.prompts == [[{"role": "user", "content": ""}]]
    assert run("generate", "--image", "cat.png", piped="").exit_code == 2


def test_a_file_that_is_not_there_is_said_before_a_model_is_loaded(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(source: Any = None) -> FakePhi:
        raise AssertionError("loaded")

    monkeypatch.setattr("phimlx.api.load", never)
    for option in ("--image", "--audio", "--video"):
        result = run("generate", option, "none.x", "What?")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == "Error: There is no file none.x.\nHint: Check the path.\n"


def test_a_model_that_reads_text_alone_says_so(files: Path) -> None:
    result = run("generate", "--model", "nano", "--image", "cat.png", "What?")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: nano reads text alone: it takes no pictures or sounds.\n"
        "Hint: Use nano-multimodal, which comes along, or phi-4-multimodal.\n"
    )


@pytest.mark.slow
def test_the_answer_is_that_of_the_api(files: Path, model: str) -> None:
    arguments = ["--image", "cat.png", "--audio", "hum.wav", "--video", "clip.mp4"]
    sampling = ["--temp", "0", "--max-tokens", "4", "--json"]
    result = run("generate", "--model", model, *arguments, "--frames", "2", *sampling, "What?")
    assert result.exit_code == 0, result.stderr
    expected = api.load(model).generate(
        "What?",
        images="cat.png",
        audio="hum.wav",
        video="clip.mp4",
        frames=2,
        temperature=0,
        max_tokens=4,
    )
    told = json.loads(result.stdout)
    assert told["text"] == expected.text
    assert told["stats"]["prompt_tokens"] == expected.stats.prompt_tokens


def test_a_file_beyond_the_limits_names_the_flag(files: Path, model: str) -> None:
    arguments = ["generate", "--model", model, "--image", "cat.png", "What?", "-m", "1"]
    refused = run(*arguments, "--max-pixels", "100")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.endswith("Hint: If you trust it, raise the limit with --max-pixels.\n")
    assert run(*arguments, "--max-pixels", "2400").exit_code == 0


def test_a_chat_sees_hears_and_goes_on_where_it_was_saved(files: Path, model: str) -> None:
    lines = "/image cat.png What?\n'hum.wav'\n\nAnd?\n/save chat.json\n"
    options = ["--temp", "0", "--max-tokens", "2"]
    result = run("chat", "--model", model, *options, piped=lines)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines() == [
        "With your next message: picture cat.png (60 × 40). Or /drop.",
        "Cut after 2 tokens.",
        "With your next message: sound hum.wav (1.0 s). Or /drop.",
        "Cut after 2 tokens.",
        "Cut after 2 tokens.",
        "Saved to chat.json.",
    ]
    messages = Conversation.load(files / "chat.json").messages
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
    assert [part["type"] for part in messages[2]["content"]] == ["audio"]
    again = run("chat", "--load", "chat.json", *options, piped="More?\n/stats\n")
    assert again.exit_code == 0, again.stderr
    (files / "cat.png").unlink()
    gone = run("chat", "--load", "chat.json", piped="More?\n")
    assert (gone.exit_code, gone.stdout) == (1, "")
    assert gone.stderr == (
        f"Error: chat.json shows a picture that cannot be read again. There is no file "
        f"{files / 'cat.png'}.\n"
        f"Hint: Put {files / 'cat.png'} back, or begin a new chat.\n"
    )


def test_a_saved_chat_with_pictures_wants_a_model_that_sees(files: Path, phi: FakePhi) -> None:
    assert run("chat", piped="/image cat.png What?\n/save chat.json\n").exit_code == 0
    phi.takes_media = False
    result = run("chat", "--load", "chat.json", piped="More?\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: fake reads text alone")


def test_ctrl_c_ends_a_transcription_with_what_has_come(files: Path, model: str) -> None:
    (files / "long.wav").write_bytes(sound_file(noise(300.0), 16_000))
    arguments = ["transcribe", "--model", model, "long.wav", "-o", "long.vtt", "--format", "vtt"]
    script = (
        "import os, signal, sys; from phimlx import transcription as t;"
        "listen = t.listening;"
        "t.listening = lambda *a: (os.kill(os.getpid(), signal.SIGINT) if a[1].start > 50 else 0,"
        " listen(*a))[1];"
        f"sys.argv = ['phimlx', *{arguments!r}];"
        "from phimlx.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=files)
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr
    assert re.search(
        r"Wrote long\.vtt\.\nStopped: long\.wav is written .+ of 5:00\.\n$", done.stderr
    )
    assert (files / "long.vtt").read_text().startswith("WEBVTT\n")


def test_a_recording_is_transcribed(files: Path, model: str) -> None:
    expected = list(api.load(model).transcribe("hum.wav"))
    result = run("transcribe", "--model", model, "hum.wav", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)["files"][0]
    assert [segment["text"] for segment in told["segments"]] == [p.text for p in expected]
    assert (told["segments"][0]["start"], told["segments"][0]["end"]) == (0.0, 1.0)


# Several files after one flag, and one from stdin


@pytest.mark.parametrize("tail", [["What?"], ["--prompt", "What?"], ["--", "What?"]])
@pytest.mark.parametrize(
    "given",
    [
        ["--image", "cat.png", "b.jpg", "c.WEBP"],
        ["--image=cat.png", "b.jpg", "c.WEBP"],
        ["--image", "cat.png", "b.jpg", "--image", "c.WEBP"],
        ["--image", "cat.png", "--image", "b.jpg", "--image", "c.WEBP"],
    ],
    ids=" ".join,
)
def test_files_that_follow_a_flag_go_with_it(
    given: list[str], tail: list[str], files: Path, phi: FakePhi
) -> None:
    for name in ("b.jpg", "c.WEBP"):
        Image.new("RGB", (9, 9)).save(files / name)
    assert run("generate", "--private", *given, *tail).exit_code == 0
    assert phi.options[0]["images"] == ["cat.png", "b.jpg", "c.WEBP"]
    assert phi.prompts[0][-1]["content"] == "What?"


@pytest.mark.parametrize(
    "prompt", ["What is in b.png", "cat", "hum.wav", "https://x.org/a b.png", "-"]
)
def test_a_prompt_behind_a_file_stays_one(prompt: str, files: Path, phi: FakePhi) -> None:
    run("generate", "--private", "--image", "cat.png", prompt, piped="cat")
    assert phi.options[0]["images"] == ["cat.png"]
    assert phi.prompts[0][-1]["content"].endswith("cat" if prompt == "-" else prompt)


def test_a_further_file_that_is_not_there_is_said(files: Path, phi: FakePhi) -> None:
    result = run("generate", "--image", "cat.png", "dog.png", "--prompt", "What?")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: There is no file dog.png.\n")


@pytest.mark.parametrize(("kind", "name"), [("image", "cat.png"), ("audio", "hum.wav")])
def test_a_file_from_stdin(kind: str, name: str, files: Path, phi: FakePhi) -> None:
    data = (files / name).read_bytes()
    result = run("generate", f"--{kind}", "-", "--prompt", "What?", piped=data)
    assert (result.exit_code, result.stdout) == (0, "Hello.\n")
    assert phi.options[0]["images" if kind == "image" else kind] == [data]
    assert phi.prompts[0][-1]["content"] == "What?"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--image", "-", "--audio", "-", "-p", "x"], "stdin (-) can be read once."),
        (["--image", "-"], "stdin (-) holds a file; give the prompt with --prompt TEXT."),
        (["--image", "-", "-"], "stdin (-) holds a file; give the prompt with --prompt TEXT."),
    ],
)
def test_stdin_is_one_thing(arguments: list[str], problem: str, files: Path, phi: FakePhi) -> None:
    result = run("generate", *arguments, piped=(files / "cat.png").read_bytes())
    assert result.exit_code == 2
    assert result.stderr.endswith(f"Error: {problem}\n")


def test_a_picture_piped_in_as_a_prompt_is_told_where_it_goes(files: Path, phi: FakePhi) -> None:
    result = run("generate", "What?", piped=(files / "cat.png").read_bytes())
    assert (result.exit_code, phi.prompts) == (1, [])
    assert result.stderr.endswith("Hint: Give a picture with --image -, a sound with --audio -.\n")
