"""`/paste`: what the clipboard holds, faked where Pillow or a program of the system gives it."""

from __future__ import annotations

import stat
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageGrab

from phimlx.errors import PhimlxError
from phimlx.media.limits import Limits
from phimlx.terminal import clipboard
from phimlx.terminal.chat_commands import candidates
from phimlx.terminal.clipboard import copied_files, paste_files
from phimlx.terminal.conversation import Conversation
from tests.media.sounds import noise, sound_file
from tests.terminal.fake_phi import FakePhi
from tests.terminal.test_chat import chat

Holds = Callable[[object], None]

NOTHING = (
    "Error: The clipboard holds no picture, sound or video.\n"
    "Hint: Copy one, or take a screenshot into it: Control-Shift-Command-4 on a Mac.\n"
)
NO_TOOL = (
    "Error: The clipboard cannot be read: neither wl-paste nor xclip is installed.\n"
    "Hint: Install wl-clipboard, or xclip for X11; or save the picture and say /image FILE.\n"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pictures are kept; no program of this machine is asked."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    kept = tmp_path / "state" / "pasted"
    monkeypatch.setattr(clipboard, "paste_folder", lambda: kept)
    return kept


@pytest.fixture
def holds(monkeypatch: pytest.MonkeyPatch) -> Holds:
    """Puts a thing into the clipboard: a picture, names of files, None, or an error."""

    def put(thing: object) -> None:
        def grab() -> object:
            if isinstance(thing, Exception):
                raise thing
            return thing

        monkeypatch.setattr(ImageGrab, "grabclipboard", grab)

    return put


def seeing(*scripts: str) -> FakePhi:
    phi = FakePhi(*scripts)
    phi.takes_media = phi.hears = True
    return phi


def program(folder: Path, name: str, text: str) -> None:
    """A program of the system that answers with `text`, or fails without."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{f'echo {text!r}' if text else 'exit 1'}\n")
    path.chmod(0o700)


def test_a_screenshot_goes_with_the_next_message(
    holds: Holds, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holds(Image.new("RGBA", (6, 4), (200, 0, 0, 255)))
    phi = seeing("Red.", "Red.")
    held = chat(phi, "/paste", "What is it?", "/paste And this?")
    (path,) = folder.iterdir()
    assert path.name.startswith("pasted-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    told = f"With your next message: picture {path.name} (6 × 4). Or /drop.\n"
    assert capsys.readouterr().err == told * 2
    for prompt, text in zip(phi.prompts, ("What is it?", "And this?"), strict=True):
        picture, question = prompt[-1]["content"]
        assert (picture["image"].size, picture["image"].getpixel((0, 0))) == ((6, 4), (200, 0, 0))
        assert question == {"type": "text", "text": text}
    assert held.conversation.messages[0]["content"][0]["path"] == str(path)


def test_a_chat_with_a_screenshot_is_saved_and_read_again(holds: Holds, tmp_path: Path) -> None:
    holds(Image.new("L", (6, 4)))
    file = tmp_path / "chat.json"
    held = chat(seeing("Grey."), "/paste What is it?", f"/save {file}")
    assert Conversation.load(file).messages == held.conversation.messages


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "F"])
def test_a_picture_of_any_kind(mode: str, holds: Holds) -> None:
    holds(Image.new(mode, (3, 2)))
    ((kind, path),) = paste_files()
    with Image.open(path) as picture:
        assert (kind, picture.format, picture.size) == ("image", "PNG", (3, 2))


def test_files_that_were_copied(
    holds: Holds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, sound = tmp_path / "a cat.png", tmp_path / "b.wav"
    Image.new("RGB", (6, 4)).save(picture)
    sound.write_bytes(sound_file(noise(0.5), 16_000))
    holds([str(picture), str(sound)])
    chat(seeing(), "/paste")
    assert capsys.readouterr().err == (
        "With your next message: picture a cat.png (6 × 4), sound b.wav (0.5 s). Or /drop.\n"
    )


@pytest.mark.parametrize(
    ("system", "tool", "answer"),
    [
        ("darwin", "osascript", "{0}"),
        ("linux", "xclip", "file://{1}"),
        ("linux", "wl-paste", "# comment\r\nfile://localhost{1}\r"),
    ],
)
def test_files_as_the_system_tells_them(
    system: str, tool: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "a cat.png"
    Image.new("RGB", (6, 4)).save(picture)
    monkeypatch.setattr("sys.platform", system)
    text = answer.format(picture, str(picture).replace(" ", "%20"))
    program(tmp_path / "bin", tool, text)
    assert paste_files() == [("image", str(picture))]


@pytest.mark.parametrize("answer", ["", "https://example.com/cat.png"])
def test_what_is_no_file_is_asked_for_as_a_picture(
    answer: str, holds: Holds, tmp_path: Path
) -> None:
    program(tmp_path / "bin", "xclip", answer)
    holds(Image.new("RGB", (6, 4)))
    assert copied_files() == []
    assert [kind for kind, _ in paste_files()] == ["image"]


@pytest.mark.parametrize(
    ("thing", "told"),
    [
        (None, NOTHING),
        ([], NOTHING),
        (NotImplementedError("wl-paste or xclip is required"), NO_TOOL),
        (
            ChildProcessError("xclip error: Error: Can't open display: (null)\x1b[2J"),
            "Error: The clipboard cannot be read: \"xclip error: Error: Can't open display: "
            '(null)\\x1b[2J".\nHint: Save the picture, then say /image FILE.\n',
        ),
        (
            ValueError("no hexadecimal digits"),
            "Error: The picture in the clipboard cannot be read.\n"
            "Hint: Save it, then say /image FILE.\n",
        ),
        (
            Image.DecompressionBombError("too large"),
            "Error: The picture in the clipboard is too large.\n"
            "Hint: Save it smaller, then say /image FILE.\n",
        ),
        (
            ["/notes\x1b[2J.txt"],
            "Error: '/notes\\x1b[2J.txt' was copied, which is no picture, sound or video.\n"
            "Hint: Copy such files alone.\n",
        ),
    ],
)
def test_what_cannot_be_pasted_is_said(
    thing: object, told: str, holds: Holds, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holds(thing)
    held = chat(seeing(), "/paste")
    assert capsys.readouterr().err == told
    assert held.pending == []
    assert not folder.exists()


def test_limits_are_those_of_other_pictures(holds: Holds, folder: Path) -> None:
    holds(Image.new("RGB", (300, 200)))
    with pytest.raises(PhimlxError) as refused:
        paste_files(Limits(max_pixels=50_000))
    assert str(refused.value) == (
        "The picture in the clipboard has 300 × 200 pixels; at most 50,000 are read."
    )
    assert refused.value.hint == "If you trust it, raise the limit with --max-pixels."
    assert not folder.exists()


def test_a_picture_that_is_cut_short(holds: Holds, folder: Path) -> None:
    held = BytesIO()
    Image.effect_noise((64, 64), 50).save(held, "PNG")
    holds(Image.open(BytesIO(held.getvalue()[:600])))
    with pytest.raises(PhimlxError, match=r"^The picture in the clipboard cannot be read\.$"):
        paste_files()
    assert not folder.exists()


def test_a_model_that_takes_none_is_told_before_the_clipboard_is_read(
    holds: Holds, capsys: pytest.CaptureFixture[str]
) -> None:
    holds(AssertionError("was read"))
    chat(FakePhi(), "/paste")
    assert capsys.readouterr().err == (
        "Error: fake reads text alone: it takes no pictures or sounds.\n"
        "Hint: Use nano-multimodal, which comes along, or phi-4-multimodal.\n"
    )


def test_a_folder_that_cannot_be_made(holds: Holds, folder: Path) -> None:
    folder.parent.write_text("a file, where the folder should be")
    holds(Image.new("RGB", (6, 4)))
    with pytest.raises(PhimlxError, match="cannot be written"):
        paste_files()


def test_it_is_completed_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert candidates("/pa") == ["/paste"]
    chat(FakePhi(), "/help")
    assert "/paste [TEXT]" in capsys.readouterr().err
