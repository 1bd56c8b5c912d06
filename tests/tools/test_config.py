"""What names MCP servers: files in Claude Desktop's form, command lines, addresses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phimlx.errors import ToolError
from phimlx.tools.config import ServerConfig, read_servers


def write(folder: Path, value: Any) -> str:
    path = folder / "mcp.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


@pytest.mark.parametrize(
    ("source", "name", "command"),
    [
        ("python server.py --fast", "server", ("python", "server.py", "--fast")),
        ("python3.12 -u 'my server.py'", "my_server", ("python3.12", "-u", "my server.py")),
        (
            "npx -y @modelcontextprotocol/server-filesystem /tmp",
            "server-filesystem",
            ("npx", "-y", "@modelcontextprotocol/server-filesystem", "/tmp"),
        ),
        ("uvx mcp-server-git", "mcp-server-git", ("uvx", "mcp-server-git")),
        ("uv run tools.py", "tools", ("uv", "run", "tools.py")),
        ("./bin/serve", "serve", ("./bin/serve",)),
        ("node", "node", ("node",)),
    ],
)
def test_a_command_line(source: str, name: str, command: tuple[str, ...]) -> None:
    assert read_servers([source]) == [ServerConfig(name, command)]


def test_addresses_and_names_that_come_again() -> None:
    found = read_servers(["http://127.0.0.1:8000/mcp", "https://127.0.0.1/mcp", "a", "b/a"])
    assert [(each.name, each.url) for each in found] == [
        ("127.0.0.1", "http://127.0.0.1:8000/mcp"),
        ("127.0.0.1-2", "https://127.0.0.1/mcp"),
        *(("a", None), ("a-2", None)),
    ]


def test_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_OF_MINE", "secret")
    servers = {
        "my files\u001b": {
            "command": "npx",
            "args": ["-y", "server", "${TOKEN_OF_MINE}"],
            "env": {"A": "${NONE_SUCH:-b}"},
            "cwd": "here",
            "autoApprove": ["x"],
        },
        "remote": {
            "type": "http",
            "url": "https://example.com/mcp",
            "headers": {"Authorization": "Bearer ${TOKEN_OF_MINE}"},
            "timeout": 5,
        },
        "off": {"command": "x", "disabled": True},
    }
    assert read_servers([write(tmp_path, {"mcpServers": servers})]) == [
        ServerConfig(
            "my_files",
            ("npx", "-y", "server", "secret"),
            {"A": "b"},
            tmp_path / "here",
            ignored=("autoApprove",),
        ),
        ServerConfig(
            "remote",
            url="https://example.com/mcp",
            headers={"Authorization": "Bearer secret"},
            timeout=5,
        ),
    ]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{", "{path} is not JSON "),
        ("[]", "{path} names no MCP servers."),
        ({}, "{path} names no MCP servers."),
        ({"mcpServers": {}}, "{path} names no MCP servers."),
        ({"mcpServers": {"a": 3}}, "{path}: 'a' is not an object."),
        ({"mcpServers": {"a": {}}}, "{path}: 'a' needs either a command or a url."),
        (
            {"mcpServers": {"a": {"command": "x", "url": "http://x"}}},
            "{path}: 'a' needs either a command or a url.",
        ),
        (
            {"mcpServers": {"a": {"url": "http://x", "type": "sse"}}},
            "{path}: 'a' has the transport 'sse', which is not spoken here.",
        ),
        ({"mcpServers": {"a": {"url": "file:///x"}}}, "{path}: 'a' 'file:///x' is no address."),
        (
            {"mcpServers": {"a": {"command": "x", "args": "y"}}},
            "{path}: 'a' has args that are no list.",
        ),
        (
            {"mcpServers": {"a": {"command": "x", "args": [1]}}},
            "{path}: 'a' has args with 1, which is no text.",
        ),
        (
            {"mcpServers": {"a": {"command": "x\0"}}},
            "{path}: 'a' has command with 'x\\x00', which is no text.",
        ),
        (
            {"mcpServers": {"a": {"command": "x", "env": {"b": None}}}},
            "{path}: 'a' has env with None, which is no text.",
        ),
        (
            {"mcpServers": {"a": {"command": "${NONE_SUCH}"}}},
            "{path}: 'a' names ${NONE_SUCH}, which the environment does not have.",
        ),
        (
            {"mcpServers": {"a": {"command": "x", "timeout": 0}}},
            "{path}: 'a' has the timeout 0; it must be seconds.",
        ),
    ],
)
def test_a_file_that_does_not_hold(tmp_path: Path, value: Any, problem: str) -> None:
    path = write(tmp_path, value)
    with pytest.raises(ToolError) as caught:
        read_servers([path])
    assert str(caught.value).startswith(problem.format(path=path) if "$" not in problem else path)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("", "No MCP server is named."),
        ("a 'b", "a 'b is no command line: No closing quotation."),
        ("http://", "'http://' is no address."),
        ("none.json", "There is no file none.json."),
    ],
)
def test_what_names_no_server(source: str, problem: str) -> None:
    with pytest.raises(ToolError) as caught:
        read_servers([source])
    assert str(caught.value) == problem
