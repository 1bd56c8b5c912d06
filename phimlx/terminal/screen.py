"""Screens of a chat: a terminal with an editable line, or a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from phimlx.errors import PromptError
from phimlx.terminal.output import Output, encode_json
from phimlx.terminal.reply import print_reply
from phimlx.terminal.sink import drawing

if TYPE_CHECKING:
    from phimlx.generation.reply import Reply
    from phimlx.terminal.interrupt import Interruptible
    from phimlx.terminal.line import Candidates


class Screen(Protocol):
    """The place where a chat happens: it reads, asks and shows."""

    interactive: bool
    on_interrupt: Callable[[], bool]
    """Called for Ctrl-C while a line is typed; whether that was what it was for."""

    def read(self) -> str | None:
        """Read what the user says next; None once there is no more."""

    def read_result(self, name: str) -> str | None:
        """Ask for the result of tool `name`; None where the user skips it."""

    def agree(self, question: str) -> bool:
        """Ask a question to be answered by yes or no; False where nobody can be asked."""

    def ask(self, question: str) -> str:
        """Ask a question; empty where nobody can be asked, or the user leaves it."""

    def edit(self, text: str) -> str | None:
        """Let the user change a text; None where nobody can, or nothing is left of it."""

    def show(self, answer: Interruptible) -> Reply:
        """Show a reply as it comes and return it."""


class PipedScreen:
    """Reads a turn from each line of stdin, and writes replies as they are."""

    interactive = False

    def __init__(self, output: Output) -> None:
        self.on_interrupt: Callable[[], bool] = lambda: False
        self._output = output
        self._lines = enumerate(() if sys.stdin is None else sys.stdin.buffer, 1)

    def read(self) -> str | None:
        for number, line in self._lines:
            try:
                return line.decode("utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError:
                raise PromptError(
                    f"Line {number} of what was piped in is not UTF-8 text."
                ) from None
        return None

    def read_result(self, name: str) -> str | None:
        return None

    def agree(self, question: str) -> bool:
        return False

    def ask(self, question: str) -> str:
        return ""

    def edit(self, text: str) -> str | None:
        return None

    def show(self, answer: Interruptible) -> Reply:
        return print_reply(answer, self._output)


class TerminalScreen:
    """Reads from an editable line, and draws replies as Markdown, their reasoning dimmed."""

    interactive = True

    def __init__(self, output: Output, candidates: Candidates, theme: str = "auto") -> None:
        from phimlx.terminal.line import LineEditor

        self.on_interrupt: Callable[[], bool] = lambda: False
        self._output = output
        self._theme = theme
        self._line = LineEditor(candidates, output)

    def read(self) -> str | None:
        interrupted = False
        while True:
            try:
                return self._line.read()
            except KeyboardInterrupt:
                if self.on_interrupt():
                    continue
                if interrupted:
                    self._output.note("Ctrl-D leaves.")
                interrupted = True
            except EOFError:
                return None

    def read_result(self, name: str) -> str | None:
        return self.ask(f"result of {name} (empty to skip): ") or None

    def agree(self, question: str) -> bool:
        return self.ask(f"{question} [y/N] ").strip().lower() in ("y", "yes")

    def edit(self, text: str) -> str | None:
        try:
            return self._line.edit(text).strip() or None
        except (KeyboardInterrupt, EOFError):
            return None

    def ask(self, question: str) -> str:
        try:
            return self._line.ask(question)
        except (KeyboardInterrupt, EOFError):
            return ""

    def show(self, answer: Interruptible) -> Reply:
        from rich.console import Console
        from rich.theme import Theme

        from phimlx.terminal.markdown import MarkdownStream

        console = Console(
            file=drawing(sys.stdout), highlight=False, theme=Theme({"markdown.code": "cyan"})
        )
        self._output.text()
        with _echo_off(), contextlib.ExitStack() as opened:
            markdown: MarkdownStream | None = None
            thinking = shown = False
            for piece in answer:
                if not piece.text:
                    continue
                shown = True
                if piece.kind == "reasoning":
                    opened.close()
                    markdown, thinking = None, True
                    self._output.write(piece.text, "dim")
                    continue
                if thinking:
                    self._output.write("\n\n")
                    thinking = False
                if markdown is None:
                    markdown = opened.enter_context(MarkdownStream(console, self._theme))
                markdown.write(piece.text)
        if shown:
            self._output.text("\n" if thinking else "")
        reply = answer.stream.reply
        for call in reply.tool_calls:
            self._output.text(f"→ {call.name} {encode_json(call.arguments)}", "cyan")
        return reply


@contextlib.contextmanager
def _echo_off() -> Iterator[None]:
    """Keep keys that are typed meanwhile off the screen; the next line finds them."""
    import termios

    try:
        terminal: Any = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (OSError, ValueError, termios.error):
        yield
        return
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
