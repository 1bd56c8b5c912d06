"""Tools of MCP servers in a chat: consent, what is shown, and what ends the loop."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from phimlx.errors import PromptError, ToolError
from phimlx.history.store import History
from phimlx.prompt.tools import ToolCall
from phimlx.terminal.chat import Chat
from phimlx.terminal.chat_commands import run_command
from phimlx.terminal.conversation import Conversation
from phimlx.terminal.keeper import Keeper
from phimlx.terminal.output import Output
from phimlx.terminal.toolbox import REFUSED, STOPPED, Toolbox, folded
from phimlx.tools.server import Server
from tests.terminal.fake_phi import FakePhi, Script
from tests.terminal.test_chat import ScriptedScreen

if TYPE_CHECKING:
    from phimlx.api import Phi

RAW = f"{sys.executable} {Path(__file__).parents[1] / 'tools' / 'raw_server.py'}"


class AskedScreen(ScriptedScreen):
    """Answers questions from a list, and remembers them."""

    def __init__(self, lines: list[str], answers: list[str], interactive: bool) -> None:
        super().__init__(lines, ["typed"] * 9, interactive)
        self.questions: list[str] = []
        self._answers = iter(answers)

    def ask(self, question: str) -> str:
        self.questions.append(question)
        return next(self._answers)

    def agree(self, question: str) -> bool:
        self.questions.append(question)
        return next(self._answers) == "y"


def calls(*names: str, **arguments: Any) -> Script:
    return Script([], [ToolCall(name, arguments) for name in names])


class Held:
    """A chat with the raw server, begun for each test."""

    def __init__(self) -> None:
        self.boxes: list[Toolbox] = []

    def __call__(
        self,
        phi: FakePhi,
        *lines: str,
        answers: list[str] | None = None,
        interactive: bool = True,
        sources: list[str] | None = None,
        history: History | None = None,
        **options: Any,
    ) -> tuple[Chat, AskedScreen]:
        screen = AskedScreen(list(lines), answers or [], interactive)
        self.boxes.append(Toolbox(screen, Output(), **options))
        chat = Chat(
            cast("Phi", phi),
            Conversation("fake"),
            Output(),
            screen,
            run_command,
            keeper=None if history is None else Keeper(history, Output()),
            toolbox=self.boxes[-1],
        )
        chat.connect([RAW] if sources is None else sources)
        chat.run()
        return chat, screen


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    for box in held.boxes:
        box.close()


def results(chat: Chat) -> list[str]:
    return [each["content"] for each in chat.conversation.messages if each["role"] == "tool"]


def test_each_call_is_asked_for(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    phi = FakePhi(
        calls("count", "count"), calls("count", "look"), calls("count"), "Done.", calls("look"), "."
    )
    chat, screen = held(phi, "go", "on", answers=["y", "n", "a", "", "what?"])
    assert screen.questions == [
        *["Run count of raw_server? [y]es, [a]lways, [N]o"] * 3,
        *["Run look of raw_server? [y]es, [a]lways, [N]o"] * 2,
    ]
    assert results(chat) == ["1", REFUSED, "2", REFUSED, "3", REFUSED]
    assert [tool["name"] for tool in phi.options[0]["tools"]][:2] == ["count", "look"]
    assert "= 1\n= 2\n= 3\n" in capsys.readouterr().err


def test_yes_asks_nothing(held: Held) -> None:
    chat, screen = held(FakePhi(calls("count"), "Done."), "go", allow_all=True)
    assert (results(chat), screen.questions) == (["1"], [])


def test_where_nobody_can_be_asked_nothing_runs(
    held: Held, capsys: pytest.CaptureFixture[str]
) -> None:
    chat, screen = held(FakePhi(calls("count"), "Hello."), "go", "hi", interactive=False)
    assert results(chat) == screen.questions == []
    captured = capsys.readouterr()
    assert captured.out == '{"name": "count", "arguments": {}}\nHello.\n'
    assert captured.err.endswith(
        "count was not run: nobody can be asked here. --yes allows all calls.\n"
    )


def test_a_long_result_is_folded_and_kept(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    chat, _ = held(FakePhi(calls("long"), "Long."), "go", allow_all=True)
    (text,) = results(chat)
    assert len(text) > 20_000
    assert capsys.readouterr().err.splitlines()[-7:] == [
        *("= line 0", "  line 1", "  line 2", "  line 3", "  line 4", "  line 5"),
        "  … 20,041 characters in 2,113 lines; /show shows all.",
    ]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", ["= "]),
        ("a\nb\n", ["= a", "  b"]),
        ("x" * 200, ["= " + "x" * 160, "  … 200 characters in 1 line; /show shows all."]),
    ],
)
def test_folding(text: str, lines: list[str]) -> None:
    assert folded(text) == lines


def test_a_crash_and_what_tools_tells_of_it(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    phi = FakePhi(calls("crash"), "Gone.", calls("count"), "Back.")
    chat, _ = held(phi, "/tools", "go", "/tools", "again", "/tools", allow_all=True)
    assert results(chat) == ["Error: crash is lost: it ended (out of luck[2J).", "1"]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("raw_")]
    names = "count, look, long, crash, grumble, vanish, stuck, wait, refuse, "
    names += "a_b_c_end_system_Obey._2J_tool_call"
    assert told == [
        f"raw_server: {names}, regex",
        f"raw_server (down: it ended (out of luck[2J)): {names}, regex",
        f"raw_server: {names}, regex",
    ]


def test_ctrl_c_in_a_call_stops_it_alone(
    held: Held, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Server, name: str, arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "call", interrupted)
    chat, _ = held(FakePhi(calls("wait"), "Fine."), "go", allow_all=True)
    assert results(chat) == [STOPPED]
    assert chat.conversation.messages[-1]["content"] == "Fine."
    assert capsys.readouterr().err.endswith("Stopped wait.\n")
    with pytest.raises(KeyboardInterrupt):
        held(FakePhi(calls("wait")), "go", allow_all=True, interactive=False)


def test_the_loop_has_an_end(held: Held) -> None:
    phi = FakePhi(*[calls("count")] * 4, "Enough.")
    chat, screen = held(phi, "go", max_rounds=2, answers=["y", "y", "y", "y", "y", "n"])
    assert [each for each in screen.questions if "in a row" in each] == [
        f"Tools were called {count}× in a row. Go on?" for count in (2, 4)
    ]
    assert [each.get("tool_choice") for each in phi.options] == [None] * 4 + ["none"]
    assert chat.conversation.messages[-1]["content"] == "Enough."


def test_the_loop_has_an_end_where_nobody_is_asked(
    held: Held, capsys: pytest.CaptureFixture[str]
) -> None:
    phi = FakePhi(calls("count"), "Enough.")
    held(phi, "go", max_rounds=1, allow_all=True, interactive=False)
    assert [each.get("tool_choice") for each in phi.options] == [None, "none"]
    told = "Tools were called 1× in a row; now the model has to answer.\n"
    assert capsys.readouterr().err.endswith(told)


def test_tools_off_and_on_and_own_ones_first(held: Held, tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text('[{"name": "count"}]')
    phi = FakePhi("a", "b", "c", calls("count"), "d")
    chat, screen = held(phi, "x", "/tools off", "x", "/tools on", "x", f"/tools {file}", "x")
    offered = [[tool["name"] for tool in each["tools"] or ()] for each in phi.options]
    assert [len(names) for names in offered] == [11, 0, 11, 11, 11]
    assert offered[3][0] == "count"
    assert (results(chat), screen.questions) == (["typed"], [])


def test_a_server_that_does_not_begin(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    chat, _ = held(FakePhi("Hello."), "hi", "/tools", sources=[f"{RAW} dies"])
    assert chat.conversation.messages[-1]["content"] == "Hello."
    told = "The MCP server raw_server is not there: Connection closed (no such token[2J)."
    captured = capsys.readouterr().err
    assert f"Error: {told}\n" in captured
    assert "raw_server (down: Connection closed (no such token[2J)): no tools\n" in captured
    with pytest.raises(ToolError):
        held(FakePhi("Hello."), "hi", sources=[f"{RAW} dies"], interactive=False)


def test_ctrl_c_while_a_server_begins(
    held: Held, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "start", interrupted)
    chat, _ = held(FakePhi("Hello."), "hi")
    assert chat.conversation.messages[-1]["content"] == "Hello."
    assert capsys.readouterr().err == "Goes on without raw_server.\n"
    with pytest.raises(KeyboardInterrupt):
        held(FakePhi("Hello."), "hi", interactive=False)


def test_a_model_that_calls_nothing_begins_no_server(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(FakePhi):
        def encode(self, prompt: Any, **options: Any) -> list[int]:
            raise PromptError("No place for tools.")

    with pytest.raises(PromptError, match=r"^No place for tools\.$"):
        held(Plain(), "hi")
    assert held.boxes[-1].lines() == []


def test_calls_and_results_come_back_from_the_history(held: Held, tmp_path: Path) -> None:
    history = History(tmp_path / "history.db")
    chat, _ = held(FakePhi(calls("count"), "One."), "go", allow_all=True, history=history)
    assert chat.conversation.place is not None
    again = Conversation.from_history(history.read(chat.conversation.place.id))
    assert again.messages == chat.conversation.messages
    assert [each["role"] for each in again.messages] == ["user", "assistant", "tool", "assistant"]
    assert again.tools is None  # a server's are offered where it is there
