"""Pictures and sounds in a chat: attached, dropped, sent, saved and read again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phimlx.errors import GenerationError, MediaError, PhimlxError, PromptError, SessionError
from phimlx.media.limits import Limits
from phimlx.terminal.attachments import Attachment, dropped_files, split_name
from phimlx.terminal.conversation import Conversation
from tests.media.sounds import av_video, noise, sound_file
from tests.terminal.fake_phi import FakePhi
from tests.terminal.test_chat import ScriptedScreen, chat

TOO_LONG = GenerationError("The prompt has 200 tokens, but fake holds 100.", "Shorten the prompt.")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, also the working one, with a picture and a sound whose names hold blanks."""
    Image.new("RGB", (6, 4), (200, 0, 0)).save(tmp_path / "a cat.png")
    (tmp_path / "it's.wav").write_bytes(sound_file(noise(0.5), 16_000))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def seeing(*scripts: Any) -> FakePhi:
    phi = FakePhi(*scripts)
    phi.takes_media = phi.hears = True
    return phi


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_go_with_the_next_message_what_is_seen_first(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phi = seeing("A cat.", "Yes.")
    held = chat(phi, "/audio it's.wav", "/image 'a cat.png' What is this?", "Sure?")
    question = held.conversation.messages[0]["content"]
    assert question == [
        {
            "type": "image",
            "path": str(files / "a cat.png"),
            "sha256": digest(files / "a cat.png"),
        },
        {"type": "audio", "path": str(files / "it's.wav"), "sha256": digest(files / "it's.wav")},
        {"type": "text", "text": "What is this?"},
    ]
    picture, sound, text = phi.prompts[0][0]["content"]
    assert (picture["type"], picture["image"].size) == ("image", (6, 4))
    assert (sound["type"], sound["audio"].rate, len(sound["audio"].samples)) == (
        ("audio", 16_000, 8000)
    )
    assert text == {"type": "text", "text": "What is this?"}
    assert phi.prompts[1][0]["content"][0]["image"] is picture["image"]
    assert phi.prompts[1][2] == {"role": "user", "content": "Sure?"}
    assert capsys.readouterr() == (
        "A cat.\nYes.\n",
        "With your next message: sound it's.wav (0.5 s). Or /drop.\n"
        "With your next message: sound it's.wav (0.5 s), picture a cat.png (6 × 4). Or /drop.\n",
    )


@pytest.mark.parametrize(
    "line",
    [
        "'{}/a cat.png'",
        '"{}/a cat.png" ',
        "{}/a\\ cat.png",
        "{}/a cat.png",
        "a cat.png",
        "~/a\\ cat.png",
        "file://{}/a%20cat.png",
    ],
)
def test_a_dropped_file_is_taken_and_said(
    line: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(files))
    phi = seeing("A cat.")
    chat(phi, line.format(files), "What is this?")
    assert [part["type"] for part in phi.prompts[0][0]["content"]] == ["image", "text"]
    assert capsys.readouterr().err == (
        "With your next message: picture a cat.png (6 × 4). Or /drop.\n"
    )


def test_several_files_dropped_at_once(files: Path) -> None:
    assert dropped_files("a\\ cat.png it\\'s.wav") == [
        ("image", "a cat.png"),
        ("audio", "it's.wav"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "What is in a cat.png",
        "none.png",
        "it's.wav and 'a cat.png",
        "a cat.txt",
        "",
        "x" * 5000 + ".png",
        "\0.png",
        "https://example.org/a.png",
    ],
)
def test_what_is_no_file_is_said(line: str, files: Path) -> None:
    (files / "a cat.txt").touch()
    assert dropped_files(line) == []


def test_a_line_that_begins_with_slashes_is_said(files: Path) -> None:
    phi = seeing("Fine.")
    chat(phi, f"/{files}/a cat.png")
    assert phi.prompts[0] == [{"role": "user", "content": f"{files}/a cat.png"}]


def test_a_sound_alone_may_be_the_question_and_a_picture_may_not(files: Path) -> None:
    phi = seeing("Hello.")
    held = chat(phi, "", "'a cat.png'", "", '"it\'s.wav"', "", "")
    assert len(phi.prompts) == 1
    assert [part["type"] for part in phi.prompts[0][0]["content"]] == ["image", "audio"]
    assert held.pending == []


def test_dropping_clearing_and_taking_back(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phi = seeing("One.", "Two.", TOO_LONG, "Three.")
    held = chat(
        phi,
        *("'a cat.png'", "/drop", "a"),
        *("/image a\\ cat.png b", "/undo"),
        *("/image a\\ cat.png c", "/clear", "/retry"),
    )
    assert [message["role"] for message in held.conversation.messages] == ["user", "assistant"]
    assert held.conversation.messages[0]["content"][1] == {"type": "text", "text": "c"}
    assert phi.prompts[0] == [{"role": "user", "content": "a"}]
    assert phi.prompts[3][0]["content"][0]["image"].size == (6, 4)
    told = capsys.readouterr().err.splitlines()
    attached = "With your next message: picture a cat.png (6 × 4). Or /drop."
    assert told[:4] == [
        attached,
        "Nothing goes with your next message.",
        attached,
        f"Took back: [picture {files}/a cat.png] …",
    ]


def test_clearing_forgets_what_waits(files: Path) -> None:
    phi = seeing("One.")
    held = chat(phi, "'a cat.png'", "/clear", "a")
    assert phi.prompts == [[{"role": "user", "content": "a"}]]
    assert held.conversation.attachments == {}


@pytest.mark.parametrize(
    ("line", "error", "hint"),
    [
        ("/image", "Which file?", "Name it, in quotes where its name has blanks."),
        ("/image 'a cat.png", "Which file?", "Name it, in quotes where its name has blanks."),
        ("/image none.png", "There is no file none.png.", "Check the path."),
        (
            "/image it\\'s.wav",
            "it's.wav: The picture is no PNG, JPEG, WEBP, GIF, BMP, TIFF, AVIF or HEIC picture.",
            None,
        ),
        ("/audio 'a cat.png'", "a cat.png: The data is not a sound that can be read.", None),
        ("/drop", "There is nothing to drop.", None),
    ],
)
def test_a_file_that_cannot_be_taken_says_why(
    line: str, error: str, hint: str | None, files: Path
) -> None:
    with pytest.raises(PhimlxError) as raised:
        chat(seeing(), line, interactive=False)
    assert str(raised.value) == error
    assert hint is None or raised.value.hint == hint


@pytest.mark.parametrize("line", ["'a cat.png'", "/audio it\\'s.wav"])
def test_a_model_that_reads_text_alone_says_so(line: str, files: Path) -> None:
    with pytest.raises(PromptError) as error:
        chat(FakePhi("never"), line, interactive=False)
    assert str(error.value) == "fake reads text alone: it takes no pictures or sounds."
    assert error.value.hint == "Use nano-multimodal, which comes along, or phi-4-multimodal."


def test_a_video_is_shown_as_pictures(files: Path) -> None:
    (files / "clip.mp4").write_bytes(av_video())
    phi = seeing("Moving.")
    held = chat(phi, "/video clip.mp4 What happens?")
    saved, text = held.conversation.messages[0]["content"]
    assert (saved["type"], saved["frames"]) == ("video", 8)
    *pictures, said = phi.prompts[0][0]["content"]
    assert [picture["type"] for picture in pictures] == ["image"] * len(pictures)
    assert len(pictures) == 8
    assert said == text


def test_limits_hold_for_what_is_attached(files: Path) -> None:
    with pytest.raises(MediaError) as error:
        Attachment.read("image", "a cat.png", Limits(max_pixels=20))
    assert str(error.value).startswith("a cat.png: ")
    assert error.value.hint == "If you trust it, raise the limit with --max-pixels."


def test_names_and_what_follows_them(files: Path) -> None:
    assert split_name("a cat.png") == ("a cat.png", "")
    assert split_name("'a cat.png' What?\nNow.") == ("a cat.png", "What?\nNow.")
    assert split_name("b\\ c.png") == ("b c.png", "")
    assert split_name("https://x.org/a.png Look") == ("https://x.org/a.png", "Look")


def test_a_chat_with_files_is_saved_and_read_again(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = files / "chat.json"
    first = chat(seeing("A cat."), "/image 'a cat.png' What?", f"/save {path}")
    assert "Image" not in path.read_text()
    phi = seeing("Yes.")
    second = chat(phi, f"/load {path}", "Sure?")
    assert second.conversation.messages[:2] == first.conversation.messages
    assert phi.prompts[0][0]["content"][0]["image"].size == (6, 4)
    with pytest.raises(PromptError) as error:
        chat(FakePhi(), f"/load {path}", interactive=False)
    assert str(error.value) == "fake reads text alone: it takes no pictures or sounds."


def test_a_file_that_is_gone_or_changed_is_named(files: Path) -> None:
    path = files / "chat.json"
    chat(seeing("A cat."), "/image 'a cat.png' What?", f"/save {path}")
    picture = files / "a cat.png"
    Image.new("RGB", (6, 4), (0, 0, 9)).save(picture)
    with pytest.raises(SessionError) as changed:
        Conversation.load(path)
    assert str(changed.value) == f"{path} shows {picture}, which has changed since."
    assert changed.value.hint == "Put the file back as it was, or begin a new chat."
    picture.unlink()
    with pytest.raises(SessionError) as gone:
        Conversation.load(path)
    assert str(gone.value) == (
        f"{path} shows a picture that cannot be read again. There is no file {picture}."
    )
    assert gone.value.hint == f"Put {picture} back, or begin a new chat."


def test_a_file_that_has_changed_reaches_no_decoder(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = files / "chat.json"
    chat(seeing("A cat."), "/image 'a cat.png' What?", f"/save {path}")
    (files / "a cat.png").write_bytes(b"something else")
    monkeypatch.setattr("phimlx.media.image.load_image", lambda *_: pytest.fail("was decoded"))
    with pytest.raises(SessionError, match="which has changed since"):
        Conversation.load(path)


URL = "https://pictures.example/cat.png"


@pytest.fixture
def linked(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A chat that was saved with a picture from a URL."""
    data = (files / "a cat.png").read_bytes()
    path = files / "chat.json"
    monkeypatch.setattr("phimlx.media.fetch.fetch", lambda url, limits: data)
    chat(seeing("A cat."), f"/image {URL} What?", f"/save {path}")
    return path


def test_nothing_is_fetched_for_a_saved_chat_unasked(
    linked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("phimlx.media.fetch.fetch", lambda *_: pytest.fail("was fetched"))
    with pytest.raises(SessionError) as error:
        Conversation.load(linked)
    assert str(error.value) == (
        f"{linked} shows {URL}, which is fetched only where somebody agrees to it."
    )
    assert error.value.hint == "Load it on a terminal, which asks, or begin a new chat."
    held = chat(seeing(), f"/load {linked}")
    assert held.conversation.messages == []
    assert str(error.value) in capsys.readouterr().err


def test_a_saved_chat_fetches_what_the_user_agrees_to(
    linked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def agree(question: str) -> bool:
        asked.append(question)
        return True

    loaded = Conversation.load(linked, agree=agree)
    assert asked == [f"Fetch {URL}, which {linked} shows?"]
    assert [each.path for each in loaded.attachments.values()] == [URL]
    phi = seeing("Yes.")
    monkeypatch.setattr(ScriptedScreen, "agrees", True)
    chat(phi, f"/load {linked}", "Sure?")
    assert phi.prompts[0][0]["content"][0]["image"].size == (6, 4)


SAVED = {"type": "image", "path": "a.png", "sha256": "0"}


@pytest.mark.parametrize(
    "content",
    [
        [],
        ["a"],
        [{"type": "text"}],
        [{"type": "text", "text": 3}],
        [SAVED | {"type": "smell"}],
        [SAVED | {"frames": 3}],
        [SAVED | {"path": 3}],
        [SAVED | {"type": "video", "frames": 0}],
        [SAVED | {"type": "video"}],
        [SAVED | {"type": []}],
    ],
)
def test_damaged_parts_are_named(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    session = {"format": "phimlx-chat", "version": 1, "model": "fake", "settings": {}}
    messages = [{"role": "user", "content": content}]
    path.write_text(json.dumps(session | {"messages": messages}))
    with pytest.raises(SessionError) as error:
        Conversation.load(path)
    assert str(error.value) == (
        f"{path} is damaged: message 1 has parts that are neither texts nor files."
    )
