"""Turns of a chat that are shown, changed, dropped, summed up and copied; models that change."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest

from phimlx.errors import ModelNotFoundError, PhimlxError
from phimlx.history.store import History
from phimlx.terminal import answer_commands
from phimlx.terminal.chat import Chat
from phimlx.terminal.chat_commands import run_command
from phimlx.terminal.compact import ASK, QUESTION
from phimlx.terminal.conversation import Conversation
from phimlx.terminal.output import Output
from tests.terminal.fake_phi import INTERRUPT, FakePhi, Script
from tests.terminal.test_chat import ScriptedScreen, chat, said

CODE = "Look:\n\n```py\nprint(1)\n```\n\nor\n\n~~~\nprint(2)\x1b[201~\n~~~\nDone.\x1b]52;c;QQ==\x07"


def test_the_context_is_told_from_four_fifths_on(capsys: pytest.CaptureFixture[str]) -> None:
    phi = FakePhi("a", Script(["b"] * 69), Script(["c"] * 70))
    chat(phi, "one", "two", "three")
    assert capsys.readouterr().err == (
        "The context is 80% full: /compact lets the model sum up the oldest turns, /drop N forgets "
        "N of them, /clear all.\n"
    )


def test_stats_are_true_whatever_was_taken_back(capsys: pytest.CaptureFixture[str]) -> None:
    phi = FakePhi("a", "b")
    chat(phi, "/system x", "one", "two", "/stats", "/undo", "/stats", "/clear", "/stats")
    assert capsys.readouterr().err.splitlines() == [
        "System prompt set.",
        "10 prompt tokens, 20.0/s · 1 tokens, 0.0/s · peak 0 bytes",
        "11 of 100 tokens of context, 11.0%",
        "Took back: two",
        "15 of 100 tokens of context, 15.0%",
        "Forgot what was said; system prompt, settings and tools stay.",
        "5 of 100 tokens of context, 5.0%",
    ]


def test_drop_forgets_the_oldest_turns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with History(tmp_path / "history.db") as history:
        phi = FakePhi("a", "b", "c", "d")
        lines = ["/system x", "one", "two", "three", "/drop 2", "four", "/drop 3", "/drop x"]
        held = chat(phi, *lines, history=history)
        assert said(held) == [
            ("system", "x"),
            *(("user", "three"), ("assistant", "c"), ("user", "four"), ("assistant", "d")),
        ]
        assert phi.prompts[-1] == [
            *held.conversation.messages[:3],
            {"role": "user", "content": "four"},
        ]
        assert [each.messages for each in history.conversations()] == [4, 6]
    assert capsys.readouterr().err.splitlines()[1:] == [
        "Forgot the oldest 2 turns.",
        "Error: There are 2 turns to drop from.",
        "Error: How many turns?",
        "Hint: Say /drop N, with a whole number.",
    ]


@pytest.mark.parametrize("agrees", [True, False])
def test_compact_shows_a_summary_before_it_counts(
    agrees: bool,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ScriptedScreen, "agrees", agrees)
    with History(tmp_path / "history.db") as history:
        phi = FakePhi("a", "b", "c", "All was said.", "d")
        held = chat(
            phi, "/system x", "/set stop END", "one", "two", "three", "/compact", "four",
            history=history,
        )  # fmt: skip
        assert [each.messages for each in history.conversations()] == [8] if not agrees else [8, 6]
    before = [("user", "one"), ("assistant", "a")]
    summary = [("user", QUESTION), ("assistant", "All was said.")]
    assert said(held) == [
        ("system", "x"),
        *(summary if agrees else before),
        *(("user", "two"), ("assistant", "b"), ("user", "three"), ("assistant", "c")),
        *(("user", "four"), ("assistant", "d")),
    ]
    assert [each["content"] for each in phi.prompts[3]] == ["x", "one", "a", ASK]
    assert (phi.options[3]["max_tokens"], phi.options[3]["stop"]) == (12, ())
    out, err = capsys.readouterr()
    assert "All was said.\n" in out
    told = "That stands for the 2 oldest messages now." if agrees else "All stays as it was."
    assert err.splitlines()[-1] == told


@pytest.mark.parametrize("script", [Script([""]), Script(["So", INTERRUPT, " far", "x"])])
def test_no_summary_changes_nothing(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    held = chat(FakePhi("a", "b", script), "one", "/compact", "two", "/compact")
    assert [content for _, content in said(held)] == ["one", "a", "two", "b"]
    assert capsys.readouterr().err == (
        "Error: There is too little to sum up: it takes two turns.\n"
        "Error: No summary came of it; the conversation stays as it was.\n"
    )


def test_edit_asks_again_in_other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    phi = FakePhi("a", "b", "c")
    held = chat(phi, "one", "two", "/edit three")
    assert said(held) == [
        ("user", "one"),
        ("assistant", "a"),
        ("user", "three"),
        ("assistant", "c"),
    ]
    monkeypatch.setattr(ScriptedScreen, "edited", "!")
    held = chat(FakePhi("a", "b"), "one", "/edit")
    assert said(held) == [("user", "one!"), ("assistant", "b")]


def test_edit_keeps_the_files_of_a_message() -> None:
    conversation = Conversation("fake")
    part = {"type": "image", "path": "/cat.png", "sha256": "0"}
    content = [part, {"type": "text", "text": "What?"}]
    conversation.messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A cat."},
    ]
    assert conversation.last_said() == "What?"
    turn = conversation.edit("Which colour?")
    assert turn.new == (
        {"role": "user", "content": [part, {"type": "text", "text": "Which colour?"}]},
    )


def test_edit_of_a_message_without_answer() -> None:
    phi = FakePhi(PhimlxError("Too long."), "b")
    assert said(chat(phi, "one", "/edit two")) == [("user", "two"), ("assistant", "b")]


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    chat(FakePhi("a", "b"), "/show", "/system x", "one", "two", "/show")
    assert capsys.readouterr().err.splitlines() == [
        *("Nothing has been said yet.", "System prompt set."),
        *("System prompt: x", "» one", "a", "» two", "b", "5 messages."),
    ]


class Terminal:
    """Takes what is written beside the gate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Output, "is_terminal", True)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr("sys.platform", "linux")


def copied(out: str) -> str:
    data = out.rpartition("\x1b]52;c;")[2].partition("\x07")[0]
    return base64.b64decode(data).decode()


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("/copy", CODE.replace("\x1b", "").replace("\x07", "")),
        ("/copy code", "print(2)[201~\n"),
    ],
)
def test_copy_through_the_terminal(
    command: str, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Terminal(monkeypatch)
    chat(FakePhi(CODE), "hi", command)
    assert copied(capsys.readouterr().out) == text


@pytest.mark.parametrize("ends", [0, 1])
def test_copy_on_a_mac(
    ends: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def run(command: list[str], **more: Any) -> None:
        given.append((command, more["input"]))
        if ends:
            raise subprocess.CalledProcessError(ends, command)

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(answer_commands, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    chat(FakePhi("Four."), "hi", "/copy")
    assert given == [(["/usr/bin/pbcopy"], b"Four.")]
    told = "Error: The clipboard cannot be written.\n" if ends else "Copied 5 characters.\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("lines", "error", "hint"),
    [
        (["/copy"], "There is no answer yet.", None),
        (["hi", "/copy all"], "What is to be copied?", "Say /copy, or /copy code."),
        (
            ["hi", "/copy code"],
            "The last answer holds no block of code.",
            "/copy copies all of it.",
        ),
        (["hi", "/copy"], "There is no terminal whose clipboard could take it.", None),
        (["/code"], "Where to?", "Say /code FILE."),
        (["/edit"], "You have said nothing yet.", None),
        (
            ["hi", "/edit"],
            "Nothing is changed.",
            "Say /edit TEXT, or change the line and send it.",
        ),
        (["hi", "/drop 2"], "There is 1 turn to drop from.", None),
        (["/model nano"], "This chat cannot change its model.", None),
    ],
)
def test_what_cannot_be_done(
    lines: list[str], error: str, hint: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(FakePhi("Four."), *lines)
    assert capsys.readouterr().err == f"Error: {error}\n" + (f"Hint: {hint}\n" if hint else "")


def test_code_is_saved_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    chat(FakePhi(CODE), "hi", f"/code {path}", f"/code {path}")
    assert path.read_text() == "print(2)\x1b[201~\n"
    assert capsys.readouterr().err == (
        f"Saved to {path}.\n"
        f"Error: {path} exists already.\nHint: Choose another name, or remove it.\n"
    )


class FakeLoader:
    """Loads scripted models by name."""

    def __init__(self, **models: FakePhi) -> None:
        self.models = models
        self.loaded: list[tuple[str, str | None]] = []

    def find(self, name: str, adapter: str | None) -> tuple[str, str | None]:
        if name == "nowhere":
            raise ModelNotFoundError("There is no model nowhere.")
        return name, adapter

    def load(self, model: str, adapter: str | None) -> Any:
        self.loaded.append((model, adapter))
        if model not in self.models:
            raise PhimlxError(f"{model} is broken.")
        return self.models[model]

    def prefix_store(self, phi: Any) -> None:
        """Keep nothing."""


def switching(loader: FakeLoader, *lines: str) -> Chat:
    held = Chat(
        cast("Any", loader.models["one"]),
        Conversation("one"),
        Output(),
        ScriptedScreen(list(lines), [], interactive=True),
        run_command,
        loader=cast("Any", loader),
    )
    held.run()
    return held


def test_another_model_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    loader = FakeLoader(one=FakePhi("a", "c"), two=FakePhi("b"))
    held = switching(
        loader,
        "/model",
        "hi",
        "/model two",
        "and?",
        "/stats",
        "/model nowhere",
        "/model broken",
    )
    assert [content for _, content in said(held)] == ["hi", "a", "and?", "b"]
    assert loader.loaded == [("two", None), ("broken", None), ("two", None)]
    assert loader.models["two"].prompts[0] == held.conversation.messages[:3]
    assert held.conversation.model == "two"
    assert capsys.readouterr().err.splitlines() == [
        "one",
        "two",
        "10 prompt tokens, 20.0/s · 1 tokens, 0.0/s · peak 0 bytes",
        "11 of 100 tokens of context, 11.0%",
        "Error: There is no model nowhere.",
        "Error: broken is broken.",
    ]


def test_a_persona_goes_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHIMLX_CONFIG_DIR", str(tmp_path))
    loader = FakeLoader(one=FakePhi("a"), two=FakePhi("b"))
    folder = tmp_path / "personas"
    switching(loader, "/persona")
    folder.mkdir()
    (folder / "brief.toml").write_text('system = "Be brief."\ntemperature = 0.1')
    (folder / "other.toml").write_text('model = "two"\nadapter = "x"')
    held = switching(
        loader, "/persona", "hi", "/persona brief", "/persona other", "so?", "/persona z"
    )
    assert said(held) == [
        ("system", "Be brief."),
        *(("user", "hi"), ("assistant", "a"), ("user", "so?"), ("assistant", "b")),
    ]
    assert loader.loaded == [("two", "x")]
    assert loader.models["two"].options[0]["temperature"] == 0.1
    assert capsys.readouterr().err.splitlines() == [
        *("There is no persona yet.", "Personas: brief, other.", "brief goes on."),
        *("other goes on.", "Error: There is no persona z."),
        "Hint: Make it: phimlx persona edit z",
    ]
