"""Real processes on real terminals and pipes: keys, signals, and readers that go away."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phimlx.history.records import Head
from phimlx.history.store import History
from phimlx.terminal.conversation import Conversation
from tests.cli.terminal import (
    ALT_ENTER,
    CTRL_C,
    CTRL_D,
    CTRL_E,
    CTRL_X,
    ENTER,
    TAB,
    UP,
    Terminal,
    paste,
)
from tests.terminal.fake_phi import PAUSE

HOME = Path(__file__).parents[2]


def driver(replies: list[Any], *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.cli.driver", json.dumps(replies), *arguments]


def open_chat(tmp_path: Path, replies: list[Any], *arguments: str, **environment: str) -> Terminal:
    home = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    terminal = Terminal(driver(replies, "chat", *arguments), HOME, **home, **environment)
    terminal.expect("fake · 100 tokens of context · /help lists the commands, Ctrl-D leaves")
    terminal.expect("> ")
    return terminal


def ask(terminal: Terminal, text: str, shown: str) -> None:
    """Send a line, and wait for what is shown for it and for the prompt."""
    terminal.type(text, ENTER)
    terminal.expect(shown)
    terminal.expect("> ")


def save(terminal: Terminal, path: Path) -> None:
    terminal.type(f"/save {path}", ENTER)
    terminal.expect("Saved to")


def leave(terminal: Terminal) -> None:
    """Wait for the prompt and end the chat."""
    terminal.expect("> ")
    terminal.type(CTRL_D)
    assert terminal.wait() == 0


def read_chat(path: Path) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in Conversation.load(path).messages]


@pytest.mark.slow
def test_a_chat_from_greeting_to_leaving(tmp_path: Path) -> None:
    replies = [
        [["reasoning", "Let me see. "], "# Hi\n\nI am *here*", ".\n\n- one\n- two"],
        "Bye\x1b[2J.",
    ]
    with open_chat(tmp_path, replies) as terminal:
        terminal.type("hello", ENTER)
        terminal.expect("Let me see. ")
        shown = terminal.expect("• two")
        assert "Hi" in shown
        assert "I am here." in shown
        assert "#" not in shown
        terminal.expect("> ")
        terminal.type("bye", ENTER)
        terminal.expect("Bye[2J.")
        leave(terminal)
        assert "\x1b[2mLet me see. \x1b[0m" in terminal.raw
        assert "\x1b[2J." not in terminal.raw


@pytest.mark.slow
def test_ctrl_c_stops_the_reply_and_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    with open_chat(tmp_path, [["Once upon", PAUSE, "", " a time"], "And on."]) as terminal:
        terminal.type("a story", ENTER)
        terminal.expect("Once upon")
        terminal.type(CTRL_C)
        terminal.expect("Stopped; what was said is kept.")
        terminal.expect("> ")
        ask(terminal, "go on", "And on.")
        save(terminal, path)
        terminal.expect("> ")
        terminal.type("/exit", ENTER)
        assert terminal.wait() == 0
    assert read_chat(path) == [
        ("user", "a story"),
        ("assistant", "Once upon"),
        ("user", "go on"),
        ("assistant", "And on."),
    ]


@pytest.mark.slow
def test_keys_typed_during_a_reply_are_not_echoed(tmp_path: Path) -> None:
    with open_chat(tmp_path, [["Wait", PAUSE, "", "."], "Fine."]) as terminal:
        terminal.type("a", ENTER)
        terminal.expect("Wait")
        assert not terminal.echoes()
        terminal.type(CTRL_C)
        terminal.expect("Stopped; what was said is kept.")
        terminal.expect("> ")
        terminal.type("b", ENTER)
        terminal.expect("Fine.")
        leave(terminal)
        assert terminal.echoes()


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_clears_the_line_and_then_hints(tmp_path: Path) -> None:
    with open_chat(tmp_path, ["Hello."]) as terminal:
        terminal.type("not sent")
        terminal.expect("not sent")
        terminal.type(CTRL_C)
        terminal.expect("> not sent")  # drawn a last time
        terminal.expect("> ")
        terminal.type(CTRL_C)
        terminal.expect("Ctrl-D leaves.")
        terminal.expect("> ")
        terminal.type("sent", ENTER)
        terminal.expect("Hello.")
        leave(terminal)


@pytest.mark.slow
def test_several_lines_by_paste_by_key_and_by_editor(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nprintf 'written\\nthere\\n' > \"$1\"\n")
    editor.chmod(0o700)
    with open_chat(tmp_path, ["One.", "Two.", "Three."], EDITOR=str(editor)) as terminal:
        terminal.type(paste("first\nsecond"))
        terminal.expect("second")
        terminal.type(ENTER)
        terminal.expect("One.")
        terminal.expect("> ")
        ask(terminal, f"third{ALT_ENTER}fourth", "Two.")
        terminal.type(CTRL_X, CTRL_E)
        terminal.expect("Three.")
        terminal.expect("> ")
        save(terminal, path)
        leave(terminal)
    assert [content for role, content in read_chat(path) if role == "user"] == [
        "first\nsecond",
        "third\nfourth",
        "written\nthere",
    ]


@pytest.mark.slow
def test_history_outlives_the_chat(tmp_path: Path) -> None:
    for reply in ("One.", "Two."):
        with open_chat(tmp_path, [reply]) as terminal:
            terminal.type("remember me" if reply == "One." else UP)
            terminal.expect("remember me")
            terminal.type(ENTER)
            terminal.expect(reply)
            terminal.expect("> ")
            terminal.type(CTRL_D)
            assert terminal.wait() == 0


def test_commands_complete(tmp_path: Path) -> None:
    with open_chat(tmp_path, []) as terminal:
        terminal.type("/st")
        terminal.expect("/stats")
        terminal.type(TAB)
        terminal.expect("ats")
        terminal.type(ENTER)
        terminal.expect("There was no reply yet.")
        leave(terminal)


@pytest.mark.slow
def test_a_tool_call_is_shown_and_its_result_typed(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    call = {"name": "weather", "arguments": {"city": "Paris\u202e"}}
    replies = [{"pieces": [], "tool_calls": [call]}, "Sunny.", {"pieces": [], "tool_calls": [call]}]
    with open_chat(tmp_path, replies) as terminal:
        terminal.type("weather?", ENTER)
        terminal.expect('→ weather {"city": "Paris\\u202e"}')
        terminal.expect("result of weather (empty to skip): ")
        ask(terminal, "25 degrees", "Sunny.")
        terminal.type("and now?", ENTER)
        terminal.expect("result of weather (empty to skip): ")
        terminal.type(CTRL_C)
        terminal.expect("> ")
        save(terminal, path)
        leave(terminal)
    assert read_chat(path)[1:] == [
        ("assistant", ""),
        ("tool", "25 degrees"),
        ("assistant", "Sunny."),
        ("user", "and now?"),
        ("assistant", ""),
    ]


@pytest.mark.slow
def test_a_dropped_picture_goes_with_what_is_said_next(tmp_path: Path) -> None:
    picture, path = tmp_path / "a cat.png", tmp_path / "chat.json"
    Image.new("RGB", (6, 4)).save(picture)
    with open_chat(tmp_path, ["A cat."]) as terminal:
        terminal.type(paste(str(picture).replace(" ", "\\ ") + " "), ENTER)
        terminal.expect("With your next message: picture a cat.png (6 × 4). Or /drop.")
        terminal.expect("> ")
        ask(terminal, "What is it?", "A cat.")
        save(terminal, path)
        leave(terminal)
    assert [part["type"] for part in Conversation.load(path).messages[0]["content"]] == [
        "image",
        "text",
    ]


@pytest.mark.slow
def test_a_chat_goes_on_is_edited_and_summed_up(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with History(data / "history.db") as history:
        said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "First."}]
        history.put(None, Head("fake"), said)
    replies = ["Second.", "Changed.", "All was said."]
    with open_chat(tmp_path, replies, "--continue", PHIMLX_DATA_DIR=str(data)) as terminal:
        assert "First." in terminal.raw  # before the prompt, which is waited for
        ask(terminal, "two", "Second.")
        terminal.type("/edit", ENTER)
        terminal.expect("> ")
        terminal.expect("two")
        terminal.type(" and a half", ENTER)
        terminal.expect("Changed.")
        terminal.expect("> ")
        terminal.type("/compact", ENTER)
        terminal.expect("All was said.")
        terminal.expect("Let this stand for the 2 oldest messages? [y/N] ")
        terminal.type("y", ENTER)
        terminal.expect("That stands for the 2 oldest messages now.")
        terminal.expect("> ")
        terminal.type("/copy", ENTER)
        terminal.expect("Copied 8 characters.")
        leave(terminal)
        assert "\x1b]52;c;Q2hhbmdlZC4=\x07" in terminal.raw
    with History(data / "history.db") as history:
        assert [each["content"] for each in history.read(1).messages] == [
            *("one", "First.", "two and a half", "Changed.")
        ]


def test_a_saved_chat_asks_before_it_fetches(tmp_path: Path) -> None:
    part = {"type": "image", "path": "https://pictures.example/cat.png", "sha256": "0"}
    session = {
        "format": "phimlx-chat",
        "version": 1,
        "model": "fake",
        "settings": {},
        "messages": [{"role": "user", "content": [part]}],
    }
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(session))
    with open_chat(tmp_path, []) as terminal:
        terminal.type(f"/load {path}", ENTER)
        terminal.expect("Fetch https://pictures.example/cat.png, which ")
        terminal.expect("[y/N] ")
        terminal.type("n", ENTER)
        terminal.expect("which is fetched only where somebody agrees to it.")
        leave(terminal)


@pytest.mark.slow
def test_an_error_leaves_the_chat_usable(tmp_path: Path) -> None:
    replies = [{"pieces": [], "error": "The prompt has 200 tokens."}, "At last."]
    with open_chat(tmp_path, replies) as terminal:
        terminal.type("long", ENTER)
        terminal.expect("Error: The prompt has 200 tokens.")
        terminal.expect("Hint: Say less.")
        terminal.expect("Your message is kept: /retry sends it again, also after /clear.")
        terminal.expect("> ")
        terminal.type("/retry", ENTER)
        terminal.expect("At last.")
        leave(terminal)


def test_generate_on_a_terminal_shows_reasoning_and_speed_dimmed(tmp_path: Path) -> None:
    replies = [[["reasoning", "Hm."], "Four", "."]]
    with Terminal(driver(replies, "generate", "2 + 2?"), HOME) as terminal:
        assert terminal.wait() == 0
        assert terminal.raw.replace("\r\n", "\n").endswith(
            "\x1b[2mHm.\x1b[0m\x1b[2m\n\n\x1b[0mFour.\n"
            "\x1b[2m10 prompt tokens, 20.0/s · 3 tokens, 2.7/s · peak 0 bytes\x1b[0m\n"
        )


def test_generate_without_a_prompt_on_a_terminal(tmp_path: Path) -> None:
    with Terminal(driver([], "generate"), HOME) as terminal:
        terminal.expect("Error: There is no prompt. Give one with --prompt TEXT, or pipe it in: ")
        assert terminal.wait() == 2


def test_ctrl_c_while_a_prompt_is_read_ends_generate(tmp_path: Path) -> None:
    with Terminal(driver([[PAUSE, "never"]], "generate", "Hi"), HOME) as terminal:
        terminal.expect("Loading the model…")
        terminal.expect("\r")
        terminal.type(CTRL_C)
        assert terminal.wait() == 130
        assert "never" not in terminal.raw
        assert "Traceback" not in terminal.raw


def test_turns_typed_where_stdout_is_a_pipe(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = " ".join(map(shlex.quote, driver(["One.\x1b[2J"], "chat")))
    with Terminal(["sh", "-c", f"exec {command} > {log}"], HOME) as terminal:
        terminal.expect("Each line is a turn; Ctrl-D ends the chat.")
        terminal.type("hi\n", CTRL_D)
        assert terminal.wait() == 0
    assert log.read_text() == "One.[2J\n"


def start(
    replies: list[Any], *arguments: str, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        driver(replies, *arguments),
        cwd=HOME,
        stdin=stdin,  # a pipe is read to its end beside a prompt
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_an_interrupted_generate_ends_with_130() -> None:
    process = start([["Once upon", PAUSE, "", " a time"]], "generate", "Hi")
    assert process.stdout
    read = os.read(process.stdout.fileno(), 100)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, read + out, err) == (130, b"Once upon\n", b"")


def test_a_reader_that_goes_away_ends_generate_quietly() -> None:
    process = start([{"pieces": ["words "], "repeat": 50_000}], "generate", "Hi")
    assert process.stdout
    assert process.stderr
    assert os.read(process.stdout.fileno(), 6) == b"words "
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 1


def test_chat_through_a_pipe() -> None:
    process = start(["One.", "Two."], "chat", stdin=subprocess.PIPE)
    out, err = process.communicate(b"a\nb\n", timeout=60)
    assert (process.returncode, out, err) == (0, b"One.\nTwo.\n", b"")
