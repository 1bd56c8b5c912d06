"""What a command takes from stdin: the prompt, text that goes with it, or a file."""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys

import click

from phimlx.errors import PromptError
from phimlx.launched import is_launched
from phimlx.terminal.output import Output

STDIN = "-"
NO_PROMPT = (
    "There is no prompt. Give one with --prompt TEXT, or pipe it in: "
    "echo 'What is MLX?' | phimlx generate"
)
UNENDING = (
    "mlx.launch does not say when what is piped in ends. Give the prompt with --prompt TEXT, and "
    "files by their path."
)
BINARY = "Give a picture with --image -, a sound with --audio -."

PATIENCE = 2.0  # seconds
WAITING = "Waiting for what is piped in to end; < /dev/null gives nothing."

Source = str | bytes
"""A path, a URL, or the bytes of what was piped in."""


def read_prompt(option: str | None, words: str | None, raw: bool, taken: bool = False) -> str:
    """Read the prompt from `--prompt`, from the argument, or from stdin.

    Without either, stdin is the prompt unless it is a terminal. What is piped in beside one goes
    before it, or where - stands.

    Args:
        taken: whether stdin holds something else.

    Raises:
        click.UsageError: where there is no prompt, or an empty one.
        PromptError: where what is piped in is not text.
    """
    parts = [part for part in (option, words) if part is not None]
    if taken and (STDIN in parts or not parts):
        raise click.UsageError("stdin (-) holds a file; give the prompt with --prompt TEXT.")
    if not parts:
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError(NO_PROMPT)
        parts = [STDIN]
    elif len(parts) == 2 and parts.count(STDIN) != 1:
        raise click.UsageError("The prompt is given twice: with --prompt and as PROMPT.")
    elif STDIN not in parts and not taken and is_piped():
        parts = [STDIN, *parts]
    texts = (read_text(raw) if part == STDIN else part for part in parts)
    text = "\n\n".join(text for text in texts if text)
    if not (text if raw else text.strip()):
        raise click.UsageError("The prompt is empty.")
    return text


def is_piped() -> bool:
    """Whether a pipe or a file is at stdin: what a program inherited from another may never end."""
    if sys.stdin is None or sys.stdin.isatty() or is_launched():
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except io.UnsupportedOperation:  # text in memory
        return True
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def read_text(raw: bool) -> str:
    """Read all of stdin as text, without the newlines at its end unless `raw`.

    Raises `PromptError` for bytes that are not UTF-8 text.
    """
    data = read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"byte {data[error.start]:#04x} at offset {error.start}"
        raise PromptError(f"What was piped in is not UTF-8 text ({place}).", BINARY) from None
    if "\0" in text:
        raise PromptError("What was piped in is binary, not text.", BINARY)
    return text if raw else text.rstrip("\r\n")


def read_bytes() -> bytes:
    """Read all of stdin, and say so where nothing comes: whoever holds the pipe may say nothing.

    Raises:
        click.UsageError: where `mlx.launch` holds it, which never lets it end.
    """
    if sys.stdin is None:
        return b""
    if is_launched():
        raise click.UsageError(UNENDING)
    with contextlib.suppress(io.UnsupportedOperation, ValueError):  # text in memory
        if not select.select([sys.stdin.fileno()], [], [], PATIENCE)[0]:
            Output().note(WAITING)
    return sys.stdin.buffer.read()


def read_files(named: dict[str, tuple[str, ...]]) -> tuple[list[tuple[str, Source]], bool]:
    """List files by kind and source, one that is called - as its bytes; tell whether there is one.

    Args:
        named: kind -> paths and URLs.

    Raises:
        click.UsageError: where stdin is named twice.
    """
    files: list[tuple[str, Source]] = [(kind, path) for kind in named for path in named[kind]]
    places = [place for place, (_, path) in enumerate(files) if path == STDIN]
    if len(places) > 1:
        raise click.UsageError("stdin (-) can be read once.")
    for place in places:
        files[place] = files[place][0], read_bytes()
    return files, bool(places)
