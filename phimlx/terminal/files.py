"""Small files that people hand to a command or get from it: read whole, written whole.

Knows text and JSON; what a file means is the caller's affair.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from phimlx.errors import PhimlxError, PromptError
from phimlx.prompt import tools


def read_json(path: Path, error: type[PhimlxError]) -> Any:
    """The JSON value in file `path`.

    Raises `error` with one sentence for a file that is missing, unreadable or no JSON.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise error(f"There is no file {path}.") from None
    except OSError as failure:
        raise error(f"{path} cannot be read: {_reason(failure)}.") from None
    except UnicodeDecodeError:
        raise error(f"{path} is not UTF-8 text.") from None
    except json.JSONDecodeError as failure:
        place = f"line {failure.lineno}, column {failure.colno}"
        raise error(f"{path} is not JSON ({place}: {failure.msg}).") from None
    except RecursionError:
        raise error(f"{path} is nested too deeply.") from None


def write_private(path: Path, text: str, error: type[PhimlxError]) -> None:
    """As `write_whole`; the file's owner alone may read it."""
    write_whole(path, text, error, mode=0o600)


def write_whole(path: Path, text: str, error: type[PhimlxError], mode: int = 0o644) -> None:
    """Replace file `path` by `text` as a whole or not at all.

    Raises `error` with one sentence where it cannot be written.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # 0600
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                os.fchmod(descriptor, mode)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as failure:
        raise error(f"{path} cannot be written: {_reason(failure)}.") from None


def read_tools(path: Path) -> list[dict[str, Any]]:
    """Definitions of the functions that a model may call, from a JSON file that lists them.

    Raises `PromptError` that says what is wrong with the file.
    """
    value = read_json(path, PromptError)
    if not value:
        raise PromptError(f"{path} holds no tools.", tools.EXAMPLE)
    try:
        return tools.read_tools(value)
    except PromptError as error:
        raise PromptError(f"{path}: {error}", error.hint) from None


def _reason(failure: OSError) -> str:
    return (failure.strerror or type(failure).__name__).lower()
