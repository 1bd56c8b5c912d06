"""What programs of this folder share: attempts, and where the server and its models are.

A program is run by the Python that has its tool, one process each; it prints a line of JSON for
each attempt.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

URL = os.environ["PHIMLX_URL"]
NANO, SEEING = "nano", "nano-multimodal"
LONG_URL, LONG = os.environ.get("PHIMLX_LONG_URL", ""), "nano-long"
PROGRAM = os.environ.get("PHIMLX_PROGRAM", "")
ASSETS = Path(os.environ["PHIMLX_ASSETS"])
PICTURE = ASSETS / "pictures" / "vision-00.png"
CLIP = ASSETS / "clips" / "speech-00.flac"
PICTURE_DATA = base64.b64encode(PICTURE.read_bytes()).decode()
PICTURE_URL = f"data:image/png;base64,{PICTURE_DATA}"
QUESTION = "What is 2 plus 3?"
ABSENT = "There is no model absent here."
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


class City(BaseModel):
    """A city, as a schema that ends whatever the model says."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Paris", "Rome"]


_attempts: list[tuple[str, Callable[[], Any]]] = []


def attempt(what: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Add a function to what is tried; it raises where the tool does not do what it should."""

    def add(function: Callable[[], Any]) -> Callable[[], Any]:
        _attempts.append((what, function))
        return function

    return add


def check(value: Any, about: str = "") -> Any:
    """Hand over a value that must not be empty or false."""
    if not value:
        raise AssertionError(f"{about or 'the value'} is {value!r}")
    return value


def refuses(call: Callable[[], Any], words: str = ABSENT) -> None:
    """Check that a call raises an error which holds the server's words."""
    try:
        got = call()
    except Exception as error:
        check(words in f"{error} {getattr(error, 'body', '')}", f"the error {error!r:.300}: told")
    else:
        raise AssertionError(f"no error, but {got!r:.200}")


def main() -> None:
    """Try everything."""
    for what, function in _attempts:
        why = ""
        try:
            function()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        print(json.dumps({"what": what, "ok": not why, "why": why}), flush=True)
