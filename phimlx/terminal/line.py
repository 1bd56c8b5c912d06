"""The line that a person types in a chat: history, several lines, pastes and an editor."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.application.current import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, is_searching
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput
from prompt_toolkit.output import create_output

from phimlx.terminal.output import Output
from phimlx.terminal.sink import UNPRINTABLE, drawing, one_line

HISTORY_FILE = "chat_history"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

Candidates = Callable[[str], list[str]]
"""The line up to the cursor -> what its last word could become."""


def history_path() -> Path:
    """Return the file that keeps the lines typed, for their owner alone."""
    return user_state_path("phimlx") / HISTORY_FILE


def open_history(output: Output) -> History:
    """Open the history on disk, or one that is forgotten where there can be none."""
    path = history_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
    except OSError as error:
        output.warning(f"what you type is not kept in {path}: {error.strerror}.")
        return InMemoryHistory()
    return FileHistory(path)


class LineEditor:
    """An editable line.

    Enter sends it. Alt-Enter, or Escape and then Enter, begins a new line; Ctrl-X Ctrl-E opens
    it in `$EDITOR`. A paste may hold several lines and is sent when Enter is pressed.
    """

    def __init__(self, candidates: Candidates, output: Output) -> None:
        is_command = Condition(lambda: get_app().current_buffer.text.startswith("/"))
        screen = create_output(stdout=drawing(sys.stdout))
        self._main: PromptSession[str] = PromptSession(
            message=[("ansicyan bold", "> ")],
            multiline=True,
            prompt_continuation=[("ansicyan", "… ")],
            key_bindings=_key_bindings(),
            completer=_Completer(candidates),
            complete_while_typing=is_command,
            history=open_history(output),
            enable_open_in_editor=True,
            enable_suspend=True,
            tempfile_suffix=".md",
            input_processors=[_Veil()],
            output=screen,
        )
        self._plain: PromptSession[str] = PromptSession(
            history=InMemoryHistory(), input_processors=[_Veil()], output=screen
        )

    def read(self) -> str:
        """Read the next line; raises KeyboardInterrupt for Ctrl-C, EOFError for Ctrl-D."""
        return self._main.prompt()

    def edit(self, text: str) -> str:
        """Read a line that begins as `text`; raises as `read`."""
        return self._main.prompt(default=text)

    def ask(self, label: str) -> str:
        """Read the answer to a question of the program's own; it is not kept in the history."""
        return self._plain.prompt([("ansicyan", f"{one_line(label)} ")])


class _Completer(Completer):
    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        before = document.text_before_cursor
        word = before.rpartition(" ")[2]
        for candidate in self._candidates(before):
            yield Completion(candidate, start_position=-len(word), display=one_line(candidate))


class _Veil(Processor):
    """Shows each character that is never shown as one replacement character; the text keeps it.

    It may come from a name that was completed, from a paste or from the history.
    """

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        return Transformation(
            [
                (fragment[0], UNPRINTABLE.sub(REPLACEMENT, fragment[1]), *fragment[2:])
                for fragment in transformation_input.fragments
            ]
        )


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter", filter=~is_searching)  # else it takes what Ctrl-R has found
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings
