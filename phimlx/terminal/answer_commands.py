"""What can be done with the last answer: copied, its code saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

from phimlx.errors import PhimlxError, SessionError
from phimlx.files import translate_write_errors, write_file
from phimlx.terminal.sink import printable

if TYPE_CHECKING:
    from phimlx.terminal.conversation import Conversation
    from phimlx.terminal.output import Output

SECONDS = 10.0  # that the program which holds the clipboard may take


def last_answer(conversation: Conversation) -> str:
    """Return the text of the last answer; raises `SessionError` where there is none."""
    for message in reversed(conversation.messages):
        if message["role"] == "assistant" and message["content"].strip():
            return str(message["content"])
    raise SessionError("There is no answer yet.")


def last_code(conversation: Conversation) -> str:
    """Return the last block of code in the last answer; raises `SessionError` without one."""
    from markdown_it import MarkdownIt

    text = last_answer(conversation)
    blocks = [
        token.content
        for token in MarkdownIt("commonmark").parse(text)
        if token.type in ("fence", "code_block") and token.content
    ]
    if not blocks:
        raise SessionError("The last answer holds no block of code.", "/copy copies all of it.")
    return blocks[-1]


def copy(text: str, output: Output) -> None:
    """Put what is printable of a text on the clipboard, so that pasting it obeys nothing.

    On a Mac pbcopy does it, elsewhere and from afar the terminal (OSC 52).

    Raises `PhimlxError` where neither is there.
    """
    clean = printable(text)
    program = which("pbcopy") if sys.platform == "darwin" else None
    if program is None or "SSH_CONNECTION" in os.environ:
        if not output.to_clipboard(clean):
            raise PhimlxError("There is no terminal whose clipboard could take it.")
        return
    try:
        subprocess.run([program], input=clean.encode(), timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise PhimlxError("The clipboard cannot be written.") from error


def save_code(conversation: Conversation, path: Path) -> None:
    """Write the last block of code to a new file; raises `SessionError` where that fails."""
    code = last_code(conversation)
    if path.exists():
        raise SessionError(f"{path} exists already.", "Choose another name, or remove it.")
    with translate_write_errors(path, SessionError):
        write_file(path, code.encode("utf-8", "replace"))
