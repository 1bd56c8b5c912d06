"""What a terminal shows that is narrow, and keys that every terminal has."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner

from phimlx.cli.group import COMMANDS, cli
from phimlx.terminal.output import _render_table
from tests.cli.in_process import Shown, run_on_terminal
from tests.cli.terminal import CTRL_D, CTRL_E, ENTER
from tests.terminal.fake_phi import FakePhi


@pytest.mark.parametrize("width", [40, 49])
def test_help_of_commands_breaks_at_words(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for words in [[], *([name] for name in COMMANDS)]:
        shown = CliRunner().invoke(cli, [*words, "--help"], prog_name="phimlx").output
        long = [line for line in shown.split("\n") if len(line) > width]
        assert [line for line in long if not stays_whole(line)] == []


def stays_whole(line: str) -> bool:
    """Whether a line is a flag's names, or an example to be copied."""
    words = line.split()
    return line.lstrip().startswith(("phimlx ", "eval ", "-")) or len(words) <= 2


def test_a_table_of_a_narrow_terminal_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/a/rather/long/path"
    monkeypatch.setattr("sys.argv", ["phimlx"])
    for width in range(8, 60):
        monkeypatch.setenv("COLUMNS", str(width))
        shown = _render_table(["", "what", "found"], [["!", "model store", f"{path}, 9 GB"]], True)
        assert "…" not in shown
        assert max(map(len, shown.splitlines())) <= max(width, len(f"  found: {path}, 9 GB"))
        assert path in "".join(shown.split()).replace("modelstore", "").replace("─", "")


CTRL_R = "\x12"


def chat(
    patch: pytest.MonkeyPatch, tmp_path: Any, *keys: tuple[str, str], width: int = 100
) -> Shown:
    patch.setattr("phimlx.api.load", lambda *given, **more: FakePhi())
    patch.setattr("phimlx.terminal.line.history_path", lambda: tmp_path / "state" / "history")
    return run_on_terminal(["chat", "--private"], patch, [*keys, ("> ", CTRL_D)], width=width)


@pytest.mark.parametrize("width", [24, 40, 60, 100])
def test_help_of_a_chat_breaks_at_words(
    width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    wide = chat(monkeypatch, tmp_path, ("> ", f"/help{ENTER}"), ("next message.", ""), width=250)
    shown = chat(monkeypatch, tmp_path, ("> ", f"/help{ENTER}"), ("message.", ""), width=width)
    lines = listed(shown.text)
    assert [line for line in lines if len(line) > width] == []
    assert " ".join(lines).split() == " ".join(listed(wide.text)).split()


def listed(text: str) -> list[str]:
    """The lines of /help."""
    return text[text.index("\n/help ") + 1 : text.rindex("message.")].split("\n")


def test_enter_takes_what_a_search_has_found_and_sends_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    shown = chat(
        monkeypatch,
        tmp_path,
        ("> ", f"/stats{ENTER}"),
        ("There was no reply yet.", ""),
        ("> ", f"{CTRL_R}stat{ENTER}{CTRL_E} x{ENTER}"),
        ("This command takes nothing after its name, but got 'x'.", ""),
    )
    assert shown.text.count("There was no reply yet.") == 1
