"""The MCP servers of a chat: their tools under names of their own, and how they are called."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from phimlx.errors import GrammarError, PromptError, ToolError
from phimlx.sizes import size_text
from phimlx.tools.background import Background
from phimlx.tools.config import read_servers
from phimlx.tools.results import ToolResult
from phimlx.tools.server import Server, require_mcp
from phimlx.tools.untrusted import MAX_NAME, clean, clean_json, clean_name

MAX_TOOLS = 128  # of all servers
MAX_DESCRIPTION = 2000  # characters
MAX_SCHEMA = 16_000  # characters of JSON, in ASCII


@dataclass(frozen=True)
class OfferedTool:
    """A tool as the model is told of it, and where it is.

    Attributes:
        definition: name, description and parameters; the name is plain, and no other tool's.
        own_name: what the server calls it.
    """

    definition: dict[str, Any]
    server: Server
    own_name: str

    @property
    def name(self) -> str:
        """The name that the model calls."""
        return str(self.definition["name"])

    def is_of(self, server: Server, own_name: str) -> bool:
        """Whether it is a server's tool of that name."""
        return self.server is server and self.own_name == own_name

    def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """Call it; what goes wrong is told in the result."""
        return self.server.call(self.own_name, arguments)


class Servers:
    """Servers and what they offer. What a server said first holds, whatever it says later."""

    def __init__(self) -> None:
        self.servers: list[Server] = []
        self.tools: dict[str, OfferedTool] = {}
        self._background = Background()

    def add(self, sources: Iterable[str]) -> list[Server]:
        """Name servers, which `start` begins; errors as of `read_servers`."""
        configs = read_servers(sources)
        if configs:
            require_mcp()
        taken = {server.name for server in self.servers}
        for config in configs:
            if config.name in taken:
                raise ToolError(f"There is an MCP server {config.name} already.")
        added = [Server(config, self._background) for config in configs]
        self.servers += added
        return added

    def start(self, server: Server, note: Callable[[str], object]) -> None:
        """Begin one, and offer its tools.

        Args:
            note: called with a sentence for each that cannot be offered.

        Raises:
            ToolError: where it does not answer.
        """
        if server.config.ignored:
            keys = ", ".join(map(clean, server.config.ignored))
            note(f"{server.name}: {keys} of its entry mean nothing here.")
        server.start()
        for tool in server.tools:
            if len(self.tools) >= MAX_TOOLS:
                note(f"{server.name}: more than {MAX_TOOLS} tools; the rest are not offered.")
                break
            try:
                if any(each.is_of(server, tool.name) for each in self.tools.values()):
                    raise PromptError("It is there twice.")
                offered = self._read(tool, server)
            except (GrammarError, PromptError) as error:
                note(f"{server.name}: {clean_name(tool.name)} is not offered. {error}")
                continue
            self.tools[offered.name] = offered

    def _read(self, tool: Any, server: Server) -> OfferedTool:
        from phimlx.generation.grammar.check import check_tool
        from phimlx.prompt.tools import read_tools

        definition: dict[str, Any] = {"name": self._free_name(tool.name, server.name)}
        if tool.description:
            definition["description"] = clean(tool.description)[:MAX_DESCRIPTION]
        parameters = clean_json(tool.input_schema)
        parameters.pop("$schema", None)
        if len(json.dumps(parameters)) > MAX_SCHEMA:
            raise PromptError(f"Its schema has more than {size_text(MAX_SCHEMA)}.")
        definition["parameters"] = parameters
        (function,) = read_tools([definition])
        check_tool(function)
        return OfferedTool(function, server, tool.name)

    def _free_name(self, own: str, server: str) -> str:
        """The tool's name made plain; with its server's, or a number, where that is taken."""
        name = clean_name(own)
        if name in self.tools:
            name = f"{server}_{name}"[:MAX_NAME]
        plain, number = name, 2
        while name in self.tools:
            name, number = f"{plain[: MAX_NAME - 4]}_{number}", number + 1
        return name

    def close(self) -> None:
        """End all of them."""
        for server in self.servers:
            server.stop("it was stopped")
        self._background.close()
