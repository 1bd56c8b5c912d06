"""Which MCP servers there are: a file in Claude Desktop's form, a command line, or an address."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from phimlx.errors import ToolError, clipped, shortened
from phimlx.files import read_json_value
from phimlx.tools.untrusted import clean_name

MAX_BYTES = 1 << 20
KNOWN = (
    *("command", "args", "env", "cwd", "url", "headers"),
    *("type", "transport", "timeout", "disabled"),
)
HTTP = ("http", "streamable-http", "streamableHttp", "streamable_http")
LAUNCHERS = ("npx", "bunx", "uvx", "uv", "pipx", "run", "tool", "exec", "node", "deno", "python")
EXAMPLE = '{"mcpServers": {"files": {"command": "npx", "args": ["-y", "…"]}}}'

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class ServerConfig:
    """How one server is reached: a command to start, or an address.

    Attributes:
        timeout: seconds that a call may take; the usual where None.
        ignored: keys of the file that mean nothing here.
    """

    name: str
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None
    ignored: tuple[str, ...] = ()


def read_servers(sources: Iterable[str]) -> list[ServerConfig]:
    """Read what `--mcp` was given: files, command lines and addresses; names become unique.

    Raises:
        ToolError: for what is none of these, or a file that does not hold.
    """
    found: list[ServerConfig] = []
    for source in sources:
        for config in _read(source):
            taken = {each.name for each in found}
            number = 2
            name = config.name
            while name in taken:
                name, number = f"{config.name}-{number}", number + 1
            found.append(replace(config, name=name))
    return found


def _read(source: str) -> list[ServerConfig]:
    if source.startswith(("http://", "https://")):
        return [_at(source, {}, {})]
    path = Path(source).expanduser()
    if path.suffix.lower() == ".json":
        return _read_file(path)
    try:
        words = shlex.split(source)
    except ValueError as error:
        raise ToolError(f"{clipped(source)} is no command line: {error}.") from None
    if not words:
        raise ToolError(
            "No MCP server is named.", hint="Give a command line, an address or a JSON file."
        )
    return [ServerConfig(_name_of(words), (os.path.expanduser(words[0]), *words[1:]))]


def _name_of(words: list[str]) -> str:
    """A name for a command: that of what a launcher launches."""
    for word in words:
        stem = Path(word).stem
        if not word.startswith("-") and stem.rstrip("0123456789.") not in LAUNCHERS:
            return clean_name(stem)
    return clean_name(Path(words[0]).stem)


def _read_file(path: Path) -> list[ServerConfig]:
    value = read_json_value(path, ToolError, hint=f"It holds {EXAMPLE}.", limit=MAX_BYTES)
    table = value.get("mcpServers", value.get("servers")) if isinstance(value, dict) else None
    if not isinstance(table, dict) or not table:
        raise ToolError(f"{path} names no MCP servers.", hint=f"It holds {EXAMPLE}.")
    found = []
    for name, entry in table.items():
        try:
            config = _entry(clean_name(name), entry, path.parent)
        except ToolError as error:
            raise ToolError(f"{path}: {shortened(name)} {error}", hint=error.hint) from None
        found += [] if config is None else [config]
    return found


def _entry(name: str, entry: Any, folder: Path) -> ServerConfig | None:
    """Read one server of a file; None for one that is switched off."""
    if not isinstance(entry, dict):
        raise ToolError("is not an object.")
    if entry.get("disabled") is True:
        return None
    kind = entry.get("type", entry.get("transport"))
    if kind not in (None, "stdio", *HTTP):
        raise ToolError(
            f"has the transport {shortened(kind)}, which is not spoken here.",
            hint="Take stdio, or the server's address for streamable HTTP.",
        )
    if ("command" in entry) == ("url" in entry):
        raise ToolError("needs either a command or a url.")
    timeout = entry.get("timeout")
    if timeout is not None and (type(timeout) not in (int, float) or not 0 < timeout <= 1e6):
        raise ToolError(f"has the timeout {shortened(timeout)}; it must be seconds.")
    ignored = tuple(str(key) for key in entry if key not in KNOWN)
    if "url" in entry:
        made = _at(_text("url", entry["url"]), _texts("headers", entry.get("headers")), {})
    else:
        args = entry.get("args", [])
        if not isinstance(args, list):
            raise ToolError("has args that are no list.")
        words = (_text("command", entry["command"]), *(_text("args", each) for each in args))
        cwd = entry.get("cwd")
        made = ServerConfig(
            name,
            (os.path.expanduser(words[0]), *words[1:]),
            _texts("env", entry.get("env")),
            None if cwd is None else folder / Path(_text("cwd", cwd)).expanduser(),
        )
    return replace(made, name=name, timeout=timeout, ignored=ignored)


def _at(url: str, headers: Mapping[str, str], env: Mapping[str, str]) -> ServerConfig:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not url.isprintable():
        raise ToolError(
            f"{shortened(url)} is no address.", hint="One is http://127.0.0.1:8000/mcp."
        )
    return ServerConfig(clean_name(parts.hostname or ""), env=env, url=url, headers=headers)


def _texts(key: str, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ToolError(f"has {key} that are no object.")
    return {str(name): _text(key, each) for name, each in value.items()}


def _text(key: str, value: Any) -> str:
    """A text of the file, in which `${NAME}` and `${NAME:-default}` are of the environment."""
    if not isinstance(value, str) or "\0" in value:
        raise ToolError(f"has {key} with {shortened(value)}, which is no text.")

    def fill(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise ToolError(
                f"names ${{{match[1]}}}, which the environment does not have.",
                hint=f"Set it: export {match[1]}=…",
            )
        return found

    return _VARIABLE.sub(fill, value)
