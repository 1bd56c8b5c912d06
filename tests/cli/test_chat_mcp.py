"""`phimlx chat --mcp`: servers from flags and personas, with consent and without."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from phimlx.cli.group import cli
from phimlx.prompt.tools import ToolCall
from tests.cli.terminal import CTRL_C, CTRL_D, ENTER
from tests.cli.test_chat import Piped, chat  # noqa: F401
from tests.cli.test_terminal import open_chat
from tests.terminal.fake_phi import FakePhi, Script

TOOLS = Path(__file__).parents[1] / "tools"
RAW = f"{sys.executable} {TOOLS / 'raw_server.py'}"
COUNT = {"name": "count", "arguments": {}}


def counting() -> FakePhi:
    return FakePhi(Script([], [ToolCall("count", {})]), "Done.", "Bye.")


def test_nothing_runs_through_a_pipe_without_consent(chat: Piped) -> None:  # noqa: F811
    chat.phi = counting()
    result = chat("--mcp", RAW, "--private", lines="go\nbye\n")
    assert (result.exit_code, result.stdout) == (0, f"{json.dumps(COUNT)}\nDone.\n")
    assert result.stderr.splitlines()[-1] == (
        "count was not run: nobody can be asked here. --yes allows all calls."
    )
    assert [each["role"] for each in chat.phi.prompts[1]] == ["user", "assistant", "user"]


def test_yes_runs_all_of_a_file(chat: Piped, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "mcp.json"
    command, script = RAW.split()
    servers = {"mine": {"command": command, "args": [script], "autoApprove": ["count"]}}
    file.write_text(json.dumps({"mcpServers": servers}))
    chat.phi = counting()
    result = chat("--mcp", str(file), "--yes", "--json", "--private", lines="go\n")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["messages"] == [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [COUNT]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "Done."},
    ]
    assert "Warning: mine: autoApprove of its entry mean nothing here.\n" in result.stderr


def test_a_conversation_goes_on_with_its_calls(chat: Piped) -> None:  # noqa: F811
    chat.phi = counting()
    assert chat("--mcp", RAW, "--yes", lines="go\n").exit_code == 0
    result = chat("--continue", lines="on\n")
    assert (result.exit_code, result.stdout) == (0, "Bye.\n")
    assert chat.phi.prompts[-1] == [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [COUNT]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "on"},
    ]
    assert chat.phi.options[-1]["tools"] is None


def test_a_persona_names_servers(
    chat: Piped,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PHIMLX_CONFIG_DIR", str(tmp_path))
    personas = tmp_path / "personas"
    personas.mkdir()
    command, script = RAW.split()
    table = {"mcpServers": {"theirs": {"command": command, "args": [script]}}}
    (personas / "mcp.json").write_text(json.dumps(table))
    (personas / "counter.toml").write_text('mcp = "mcp.json"\n')
    (personas / "again.toml").write_text(f'mcp = ["{RAW}"]\n')
    chat.phi = counting()
    result = chat("--persona", "counter", "--yes", "--private", lines="go\n")
    assert (result.exit_code, result.stdout) == (0, f"{json.dumps(COUNT)}\nDone.\n")
    chat.phi = counting()
    result = chat("--yes", "--private", lines="/persona again\n/persona again\ngo\n/tools\n")
    assert (result.exit_code, result.stdout) == (0, f"{json.dumps(COUNT)}\nDone.\n")
    assert "raw_server: count, look, " in result.stderr


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("none.json", "There is no file none.json."),
        (f"{RAW} dies", "The MCP server raw_server is not there: Connection closed"),
    ],
)
def test_a_server_that_is_not_there_ends_a_pipe(
    chat: Piped,  # noqa: F811
    source: str,
    error: str,
) -> None:
    result = chat("--mcp", source, "--private", lines="go\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"Error: {error}" in result.stderr


def test_without_the_package(chat: Piped, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setitem(sys.modules, "mcp", None)
    result = chat("--mcp", RAW, lines="go\n")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: MCP servers need the package mcp.\n"
        "Hint: Install it with: pip install 'phimlx[mcp]'\n"
    )


@pytest.mark.slow
def test_nano_calls_a_tool_of_the_packages_server() -> None:
    real = f"{sys.executable} {TOOLS / 'mcp_server.py'}"
    arguments = ["chat", "--model", "nano", "--no-server", "--private", "--mcp", real, "--yes"]
    result = CliRunner().invoke(cli, [*arguments, "--temp", "0"], input="What is 12 + 5?\n")
    call = {"name": "add", "arguments": {"a": 12, "b": 5}}
    assert (result.exit_code, result.stdout) == (0, f"{json.dumps(call)}\n17\n")
    assert result.stderr.endswith("= 17\n")


@pytest.mark.slow
def test_a_person_is_asked_and_stops_a_call(tmp_path: Path) -> None:
    look = {"name": "look", "arguments": {"place": "here"}}
    replies = [
        {"pieces": ["I look."], "tool_calls": [look, COUNT]},
        {"pieces": [], "tool_calls": [{"name": "wait", "arguments": {}}, COUNT]},
        "Done.",
    ]
    with open_chat(tmp_path, replies, "--mcp", RAW, "--private") as terminal:
        terminal.type("go", ENTER)
        terminal.expect('→ look {"place": "here"}')
        terminal.expect("Run look of raw_server? [y]es, [a]lways, [N]o ")
        terminal.type("n", ENTER)
        terminal.expect("Run count of raw_server? [y]es, [a]lways, [N]o ")
        terminal.type("a", ENTER)
        terminal.expect("= 1")
        terminal.expect("Run wait of raw_server? [y]es, [a]lways, [N]o ")
        terminal.type("y", ENTER)
        terminal.expect("wait runs; Ctrl-C stops it")
        terminal.type(CTRL_C)
        terminal.expect("Stopped wait.")
        terminal.expect("= ")  # the number tells whether the call had come there
        terminal.expect("Done.")
        terminal.expect("> ")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
