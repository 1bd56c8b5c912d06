"""Tools of MCP servers in a chat: shown, asked for, run, and what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phimlx.errors import ToolError
from phimlx.sizes import counted
from phimlx.terminal.output import Output
from phimlx.terminal.screen import Screen
from phimlx.tools import MAX_ROUNDS

if TYPE_CHECKING:
    from phimlx.prompt.tools import ToolCall
    from phimlx.tools.results import ToolResult
    from phimlx.tools.servers import OfferedTool, Servers

FOLDED_LINES = 6
FOLDED_WIDTH = 160

REFUSED = "The user did not allow this call."
STOPPED = "The user stopped this call."


class Toolbox:
    """What the model of a chat may call by itself.

    Nothing is run unless somebody agrees to the call, to every call of its tool, or to all of them
    beforehand.

    Attributes:
        offers: whether the model is told of the tools.
        max_rounds: replies with calls in a row, after which the model has to answer.
    """

    def __init__(
        self, screen: Screen, output: Output, allow_all: bool = False, max_rounds: int = MAX_ROUNDS
    ) -> None:
        self.offers = True
        self.max_rounds = max_rounds
        self._screen = screen
        self._output = output
        self._allow_all = allow_all
        self._always: set[str] = set()
        self._sources: list[str] = []
        self._servers: Servers | None = None

    def connect(self, sources: Sequence[str]) -> None:
        """Begin servers, unless they are; on a terminal it goes on without one that is not there.

        Raises:
            ToolError: for what names no server, and elsewhere for one that does not answer.
        """
        sources = [source for source in sources if source not in self._sources]
        if not sources:
            return
        from phimlx.tools.servers import Servers

        self._servers = self._servers or Servers()
        added = self._servers.add(sources)
        self._sources += sources
        for server in added:
            notes: list[str] = []
            try:
                with self._output.status(f"Starting {server.name} …"):
                    self._servers.start(server, notes.append)
                for note in notes:
                    self._output.warning(note)
            except (ToolError, KeyboardInterrupt) as error:
                if not self._screen.interactive:
                    raise
                if isinstance(error, ToolError):
                    self._output.error(error)
                else:
                    self._output.note(f"Goes on without {server.name}.")

    def close(self) -> None:
        """End the servers."""
        if self._servers is not None:
            self._servers.close()

    def lines(self) -> list[str]:
        """Tell of each server what it offers, and whether it is there."""
        if self._servers is None:
            return []
        told = []
        for server in self._servers.servers:
            names = [name for name, tool in self._tools.items() if tool.server is server]
            state = "" if server.is_up else f" (down: {server.problem})"
            told.append(f"{server.name}{state}: {', '.join(names) or 'no tools'}")
        if not self.offers:
            told.append("They are not offered: /tools on offers them again.")
        return told

    def offered(self, own: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """Return the definitions of all tools; one of the conversation's `own` hides its like."""
        given = list(own or ())
        names = {tool["name"] for tool in given}
        if self.offers:
            given += [tool.definition for name, tool in self._tools.items() if name not in names]
        return given or None

    def results(
        self, calls: Sequence[ToolCall], own: Sequence[dict[str, Any]] | None
    ) -> list[str] | None:
        """Run calls; the user gives what comes of those that are not run here.

        None where there are none, or one of them stays without a result.
        """
        results: list[str] = []
        for call in calls:
            runs = self.has(call.name, own)
            result = self.run(call) if runs else self._screen.read_result(call.name)
            if result is None:
                return None
            results.append(result)
        return results or None

    def has(self, name: str, own: Sequence[dict[str, Any]] | None) -> bool:
        """Tell whether a tool is run here, and not one of the conversation's own."""
        return name in self._tools and all(tool["name"] != name for tool in own or ())

    def run(self, call: ToolCall) -> str | None:
        """Run a call, if it is allowed, and return what the model is told; None to leave it be."""
        tool = self._tools[call.name]
        if not self._allows(tool):
            if self._screen.interactive:
                return REFUSED
            self._output.note(
                f"{tool.name} was not run: nobody can be asked here. --yes allows all calls."
            )
            return None
        try:
            with self._output.status(f"{tool.name} runs; Ctrl-C stops it …"):
                result = tool.call(call.arguments)
        except KeyboardInterrupt:
            if not self._screen.interactive:
                raise
            self._output.note(f"Stopped {tool.name}.")
            return STOPPED
        self._show(result)
        return result.text

    def goes_on(self, rounds: int) -> bool:
        """Ask whether the model may call on."""
        if self._screen.interactive and not self._allow_all:
            return self._screen.agree(f"Tools were called {rounds}× in a row. Go on?")
        self._output.note(f"Tools were called {rounds}× in a row; now the model has to answer.")
        return False

    @property
    def _tools(self) -> dict[str, OfferedTool]:
        return {} if self._servers is None else self._servers.tools

    def _allows(self, tool: OfferedTool) -> bool:
        if self._allow_all or tool.name in self._always:
            return True
        if not self._screen.interactive:
            return False
        question = f"Run {tool.name} of {tool.server.name}? [y]es, [a]lways, [N]o"
        answer = self._screen.ask(question).strip().lower()
        if answer in ("a", "always"):
            self._always.add(tool.name)
        return answer in ("y", "yes", "a", "always")

    def _show(self, result: ToolResult) -> None:
        style = "yellow" if result.failed else "dim"
        for line in folded(result.text):
            self._output.note(line, style)


def folded(text: str) -> list[str]:
    """Return the first lines of a result, and how much there is more."""
    lines = text.strip("\n").split("\n")
    shown = [line[:FOLDED_WIDTH] for line in lines[:FOLDED_LINES]]
    if shown != lines:
        count = counted(len(lines), "line")
        shown.append(f"… {len(text):,} characters in {count}; /show shows all.")
    return [f"= {shown[0]}", *(f"  {line}" for line in shown[1:])]
