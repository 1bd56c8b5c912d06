"""What hands type that know another program: names of commands, MODEL by position, help."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner, Result

from phimlx.cli.group import COMMANDS, SYNONYMS, cli
from tests.terminal.fake_phi import FakePhi
from tests.terminal.test_chat import chat


def run(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(cli, arguments, input=text, prog_name="phimlx")


@pytest.mark.parametrize(("other", "ours"), SYNONYMS.items())
def test_a_command_answers_to_what_others_call_it(other: str, ours: str) -> None:
    assert other not in COMMANDS
    shown = run(other, "--help").output
    assert shown.startswith(f"Usage: phimlx {ours} ")
    assert shown == run(ours, "--help").output


@pytest.mark.parametrize("name", [*COMMANDS, "pull", "config set"])
def test_help_of_a_command(name: str) -> None:
    result = run("help", *name.split())
    assert (result.exit_code, result.output) == (0, run(*name.split(), "--help").output)


def test_help_alone_is_help() -> None:
    assert (run("help").exit_code, run("help").output) == (0, run("--help").output)


def test_version_has_a_letter() -> None:
    assert run("-V").output == run("--version").output


@pytest.mark.parametrize("name", [name for name in (*COMMANDS, "help") if len(name) > 3])
@pytest.mark.parametrize("where", range(3))
def test_two_letters_in_the_wrong_order_are_understood(name: str, where: int) -> None:
    typed = name[:where] + name[where + 1] + name[where] + name[where + 2 :]
    if typed in (name, *SYNONYMS):
        return
    result = run(typed)
    assert result.exit_code == 2
    assert f"Error: No such command '{typed}'. " in result.stderr
    assert f"'{name}'" in result.stderr.partition("Did you mean")[2]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were loaded, by name; each answers once."""
    names: list[Any] = []

    def load(source: Any, *rest: Any, **more: Any) -> FakePhi:
        names.append(source)
        return FakePhi("Hello.")

    monkeypatch.setattr("phimlx.api.load", load)
    return names


@pytest.mark.parametrize(
    "arguments", [("chat", "nano"), ("run", "nano"), ("chat", "--model", "nano")]
)
def test_chat_takes_the_model_by_position(arguments: tuple[str, ...], loaded: list[Any]) -> None:
    result = run(*arguments, "--private", text="hi\n")
    assert (result.exit_code, result.stdout) == (0, "Hello.\n")
    assert loaded == ["nano"]


@pytest.mark.parametrize("command", ["chat", "bench", "serve"])
@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("nano", "--model", "phi-4"), "The model is given twice: with --model and as MODEL."),
        (
            ("nano", "why is it so?"),
            "One MODEL is taken, but 2 words are given. To ask one question: "
            "phimlx generate --model nano PROMPT",
        ),
    ],
)
def test_one_model_is_taken(command: str, given: tuple[str, ...], problem: str) -> None:
    result = run(command, *given)
    assert result.exit_code == 2
    assert result.stderr.endswith(f"Error: {problem}\n")


@pytest.mark.parametrize("line", ["exit", "quit", " Quit ", "/exit", "/quit", "/bye", "/q", "/BYE"])
def test_a_person_leaves_a_chat_in_whatever_words(line: str) -> None:
    phi = FakePhi("Never said.")
    held = chat(phi, line, "hi")
    assert (held.left, held.conversation.messages) == (True, [])


def test_a_question_mark_lists_the_commands_of_a_chat(capsys: pytest.CaptureFixture[str]) -> None:
    chat(FakePhi(), "/?")
    asked = capsys.readouterr()
    chat(FakePhi(), "/help")
    assert "/stats" in asked.err
    assert capsys.readouterr() == asked


def test_in_a_pipe_such_a_word_is_a_turn(loaded: list[Any]) -> None:
    assert run("chat", "--private", text="exit\n").stdout == "Hello.\n"
