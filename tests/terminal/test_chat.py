"""A chat, turn by turn, with a scripted model and a scripted person."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from phimlx.errors import GenerationError, PhimlxError
from phimlx.history.store import History
from phimlx.prompt.tools import ToolCall
from phimlx.terminal.chat import Chat
from phimlx.terminal.chat_commands import COMMANDS, candidates, run_command
from phimlx.terminal.conversation import Conversation
from phimlx.terminal.keeper import Keeper
from phimlx.terminal.output import Output
from phimlx.terminal.reply import print_reply
from tests.terminal.fake_phi import INTERRUPT, FakePhi, Script

if TYPE_CHECKING:
    from phimlx.api import Phi
    from phimlx.generation.reply import Reply
    from phimlx.terminal.interrupt import Interruptible

CALL = ToolCall("search", {"q": "MLX"})
TOO_LONG = GenerationError("The prompt has 200 tokens, but fake holds 100.", "Shorten the prompt.")


class ScriptedScreen:
    """Says its lines and gives its results; shows replies plainly."""

    agrees = False
    edited: str | None = None

    def __init__(self, lines: list[str], results: list[str | None], interactive: bool) -> None:
        self.interactive = interactive
        self.on_interrupt: Callable[[], bool] = lambda: False
        self._lines = iter(lines)
        self._results = iter(results)

    def read(self) -> str | None:
        return next(self._lines, None)

    def read_result(self, name: str) -> str | None:
        return next(self._results)

    def agree(self, question: str) -> bool:
        return self.agrees

    def edit(self, text: str) -> str | None:
        return None if self.edited is None else text + self.edited

    def show(self, answer: Interruptible) -> Reply:
        return print_reply(answer, Output())


def chat(
    phi: FakePhi,
    *lines: str,
    results: list[str | None] | None = None,
    interactive: bool = True,
    conversation: Conversation | None = None,
    history: History | None = None,
) -> Chat:
    """A chat in which those lines were said."""
    held = Chat(
        cast("Phi", phi),
        conversation or Conversation("fake"),
        Output(),
        ScriptedScreen(list(lines), results or [], interactive),
        run_command,
        keeper=None if history is None else Keeper(history, Output()),
    )
    held.run()
    return held


def said(held: Chat) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in held.conversation.messages]


def test_turns_build_on_each_other_with_one_cache(capsys: pytest.CaptureFixture[str]) -> None:
    phi = FakePhi("Hello.", "Fine.")
    held = chat(phi, "hi", "", "  how are you?\nreally ", "/exit", "never said")
    assert said(held) == [
        ("user", "hi"),
        ("assistant", "Hello."),
        ("user", "how are you?\nreally"),
        ("assistant", "Fine."),
    ]
    assert phi.prompts == [held.conversation.messages[:1], held.conversation.messages[:3]]
    assert [options["cache"] for options in phi.options] == [phi.caches[0]] * 2
    assert capsys.readouterr() == ("Hello.\nFine.\n", "")


def test_settings_reach_the_model_and_can_be_unset(capsys: pytest.CaptureFixture[str]) -> None:
    phi = FakePhi("a", "b")
    chat(
        phi,
        "/set temp 0.5",
        "/set max-tokens 9",
        "/set stop END",
        "/set stop two words",
        "one",
        "/set temperature default",
        "/set stop default",
        "/set temp",
        "two",
    )
    cache = {"cache": phi.caches[0], "tools": None}
    assert phi.options == [
        {**cache, "temperature": 0.5, "max_tokens": 9, "stop": ("END", "two words")},
        {**cache, "max_tokens": 9},
    ]
    assert capsys.readouterr().err.splitlines() == [
        "temp  0.5",
        "max-tokens  9",
        "stop  'END'",
        "stop  'END', 'two words'",
        "temp  0.8 (the model's default)",
        "stop  not set",
        "temp  0.8 (the model's default)",
    ]


@pytest.mark.parametrize(
    ("line", "error", "hint"),
    [
        (
            "/hlep",
            "There is no command /hlep.",
            "Did you mean /help? A line that begins with // is sent as it is.",
        ),
        (
            "/zzz me",
            "There is no command /zzz.",
            "/help lists the commands. A line that begins with // is sent as it is.",
        ),
        ("/clear all", "This command takes nothing after its name, but got 'all'.", None),
        ("/set top-p 7", "top-p: 7.0 is not in the range 0<x<=1.", None),
        ("/undo", "There is nothing to undo.", None),
        ("/retry", "There is nothing to retry.", None),
        ("/save", "Where to? Nothing was saved or loaded before.", "Say /save FILE."),
        (
            "/load",
            "Which one?",
            "Say /load FILE, or /load ID of those that /history lists.",
        ),
        (
            "/history",
            "This chat is private: it neither keeps nor reads conversations.",
            "phimlx history list shows them.",
        ),
        ("/load none.json", "There is no file none.json.", None),
        ("/tools none.json", "There is no file none.json.", None),
    ],
)
def test_a_command_that_cannot_be_obeyed_says_why(
    line: str, error: str, hint: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    held = chat(FakePhi("still here"), line, "hi")
    assert said(held) == [("user", "hi"), ("assistant", "still here")]
    expected = f"Error: {error}\n" + (f"Hint: {hint}\n" if hint else "")
    assert capsys.readouterr() == ("still here\n", expected)
    with pytest.raises(PhimlxError) as caught:
        chat(FakePhi(), line, interactive=False)
    assert (str(caught.value), caught.value.hint) == (error, hint)


@pytest.mark.parametrize(
    ("line", "content"),
    [("//help me", "/help me"), ("/etc/hosts is what?", "/etc/hosts is what?"), ("/ 2", "/ 2")],
)
def test_what_only_looks_like_a_command_is_said(line: str, content: str) -> None:
    assert said(chat(FakePhi("ok"), line))[0] == ("user", content)


def test_system_clear_undo_retry(capsys: pytest.CaptureFixture[str]) -> None:
    phi = FakePhi("one", "two", "two again", "three")
    held = chat(
        phi,
        "/system",
        "/system Be\nbrief.",
        "/system",
        "a",
        "b\nmore",
        "/retry",
        "/undo",
        "/system off",
        "c",
        "/clear",
    )
    assert said(held) == []
    assert phi.prompts[2] == phi.prompts[1]
    assert phi.prompts[3] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "c"},
    ]
    assert capsys.readouterr() == (
        "one\ntwo\ntwo again\nthree\n",
        "There is no system prompt.\n"
        "System prompt set.\n"
        "Be\nbrief.\n"
        "Took back: b …\n"
        "No system prompt from here on.\n"
        "Forgot what was said; system prompt, settings and tools stay.\n",
    )


def test_a_message_too_long_is_kept_for_retry(capsys: pytest.CaptureFixture[str]) -> None:
    phi = FakePhi("Hello.", TOO_LONG, TOO_LONG, "At last.")
    held = chat(phi, "hi", "long", "/retry", "/clear", "/retry")
    assert said(held) == [("user", "long"), ("assistant", "At last.")]
    error = (
        "Error: The prompt has 200 tokens, but fake holds 100.\n"
        "Hint: Shorten the prompt.\n"
        "Your message is kept: /retry sends it again, also after /clear.\n"
    )
    assert capsys.readouterr() == (
        "Hello.\nAt last.\n",
        f"{error}{error}Forgot what was said; system prompt, settings and tools stay.\n",
    )


def test_an_unforeseen_error_leaves_the_chat_usable(capsys: pytest.CaptureFixture[str]) -> None:
    phi = FakePhi(Script(["Hel"], error=RuntimeError("out of memory")), "Hello.")
    held = chat(phi, "hi", "/retry")
    assert said(held) == [("user", "hi"), ("assistant", "Hello.")]
    assert [options["cache"] for options in phi.options] == phi.caches
    assert len(phi.caches) == 2
    assert capsys.readouterr().err == (
        "Error: unexpected RuntimeError: out of memory\n"
        "Hint: Run it again with --debug to see where it happened.\n"
    )


def test_through_a_pipe_the_first_error_ends_the_chat() -> None:
    with pytest.raises(GenerationError, match=r"^The prompt has 200 tokens"):
        chat(FakePhi(TOO_LONG), "hi", "never said", interactive=False)


def test_ctrl_c_keeps_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    phi = FakePhi(Script(["Once ", INTERRUPT, "upon", " a time"]), "And on.")
    held = chat(phi, "a story", "go on")
    assert said(held)[:2] == [("user", "a story"), ("assistant", "Once upon")]
    assert phi.prompts[1][1] == {"role": "assistant", "content": "Once upon"}
    assert len(phi.caches) == 1
    assert capsys.readouterr() == (
        "Once upon\nAnd on.\n",
        "Stopped; what was said is kept.\n",
    )


@pytest.mark.parametrize(
    ("script", "caches"),
    [
        (Script([INTERRUPT, "never"]), 2),
        (Script([("reasoning", "hm"), INTERRUPT, ("reasoning", "m"), "never"]), 1),
    ],
)
def test_ctrl_c_before_an_answer_keeps_the_question(
    script: Script, caches: int, capsys: pytest.CaptureFixture[str]
) -> None:
    phi = FakePhi(script, "Hello.")
    held = chat(phi, "hi", "/retry")
    assert said(held) == [("user", "hi"), ("assistant", "Hello.")]
    assert len(phi.caches) == caches
    assert capsys.readouterr() == (
        "Hello.\n",
        "Stopped before an answer; /retry asks again.\n",
    )


def test_ctrl_c_outside_a_reply_ends_what_was_asked_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("phimlx.terminal.chat_commands.load_tools", interrupted)
    held = chat(FakePhi("Hello."), "/tools x", "hi")
    assert said(held) == [("user", "hi"), ("assistant", "Hello.")]
    assert capsys.readouterr() == ("Hello.\n", "Stopped.\n")


def test_ctrl_c_through_a_pipe_ends_the_chat() -> None:
    with pytest.raises(KeyboardInterrupt):
        chat(FakePhi(Script(["a", INTERRUPT, "b", "c"])), "hi", "never said", interactive=False)


def test_a_tool_is_called_answered_and_the_model_goes_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "tools.json"
    file.write_text('[{"type": "function", "function": {"name": "search"}}, {"name": "add"}]')
    phi = FakePhi(Script(["I look."], [CALL, CALL]), "Found.", "Bye.")
    held = chat(phi, f"/tools {file}", "what?", "/tools off", "bye", results=["x", "y"])
    assert said(held)[:5] == [
        ("user", "what?"),
        ("assistant", "I look."),
        ("tool", "x"),
        ("tool", "y"),
        ("assistant", "Found."),
    ]
    assert (
        held.conversation.messages[1]["tool_calls"]
        == [{"name": "search", "arguments": {"q": "MLX"}}] * 2
    )
    tools = [options["tools"] for options in phi.options]
    assert tools == [[{"name": "search"}, {"name": "add"}]] * 2 + [None]
    call = '{"name": "search", "arguments": {"q": "MLX"}}\n'
    assert capsys.readouterr() == (
        f"I look.\n{call}{call}Found.\nBye.\n",
        "The model may call search, add.\nThere are no tools.\n",
    )


def test_a_tool_that_is_skipped_leaves_the_call(tmp_path: Path) -> None:
    phi = FakePhi(Script([], [CALL, CALL]), "Fine.")
    held = chat(phi, "what?", "never mind", results=["x", None])
    assert said(held) == [
        ("user", "what?"),
        ("assistant", ""),
        ("user", "never mind"),
        ("assistant", "Fine."),
    ]


def test_warnings_and_a_cut_reply_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    chat(FakePhi(Script(["a", "b"], finish_reason="length", warnings=["odd call."])), "hi")
    assert capsys.readouterr() == ("ab\n", "Warning: odd call.\nCut after 2 tokens.\n")


def test_stats(capsys: pytest.CaptureFixture[str]) -> None:
    chat(FakePhi(Script(["a", "b", "c"])), "/stats", "hi", "/stats")
    assert capsys.readouterr().err == (
        "There was no reply yet.\n"
        "10 prompt tokens, 20.0/s · 3 tokens, 2.7/s · peak 0 bytes\n"
        "13 of 100 tokens of context, 13.0%\n"
    )


def test_a_chat_is_saved_loaded_and_saved_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "chat.json"
    first = chat(FakePhi("Hello."), "/set seed 3", "hi", f"/save {path}", "/exit")
    phi = FakePhi("lost", "Fine.")
    other = Conversation("other")
    second = chat(phi, "x", f"/load {path}", "how are you?", "/save", conversation=other)
    assert phi.prompts[1][:2] == first.conversation.messages
    assert phi.options[1]["seed"] == 3
    assert Conversation.load(path) == second.conversation
    assert second.conversation.model == "other"
    assert capsys.readouterr().err == (
        "seed  3\n"
        f"Saved to {path}.\n"
        "That chat was with fake; other goes on with it.\n"
        "» hi\n"
        "Hello.\n"
        f"Loaded 2 messages from {path}.\n"
        f"Saved to {path}.\n"
    )


def test_a_damaged_file_leaves_the_conversation_untouched(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps({"format": "phimlx-chat", "version": 1, "model": "x"}))
    held = chat(FakePhi("Hello."), "hi", f"/load {path}")
    assert said(held) == [("user", "hi"), ("assistant", "Hello.")]
    assert held.saved_as is None


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    chat(FakePhi(), "/help")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines[: len(COMMANDS)]] == [f"/{name}" for name in COMMANDS]
    assert lines[len(COMMANDS) + 1 :] == [
        "Enter sends, Alt-Enter begins a new line, Ctrl-X Ctrl-E opens $EDITOR.",
        "Ctrl-C stops a reply, Ctrl-D leaves.",
        "A picture, sound or video dropped here goes with your next message.",
    ]


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chat.json").touch()
    (tmp_path / "chats").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert candidates("/s") == ["/system", "/speak", "/show", "/save", "/set", "/stats"]
    monkeypatch.setenv("PHIMLX_CONFIG_DIR", str(tmp_path))
    (tmp_path / "config.toml").write_text("alias.phi-work = 'x'")
    (tmp_path / "personas").mkdir()
    (tmp_path / "personas" / "letters.toml").touch()
    assert candidates("/model phi-w") == ["phi-work"]
    assert "nano" in candidates("/model n")
    assert candidates("/persona l") == ["letters"]
    (tmp_path / "config.toml").write_text("broken")
    assert candidates("/model phi-w") == []
    assert candidates("/set t") == ["temp", "top-p", "top-k"]
    assert candidates("/load ch") == ["chat.json", "chats/"]
    assert candidates("/save ~/chat.") == ["~/chat.json"]
    assert candidates("/set temp 0") == []
    assert candidates("/help x") == []
    assert candidates("/nothing x") == []
    assert candidates("hello") == []
