"""Text that strangers wrote, made fit to be read by a model and shown to a person."""

from __future__ import annotations

import re
from typing import Any

# What a terminal obeys or nobody sees: control characters without tab and newline, invisible and
# directional ones, halves of surrogates, and tags, in which text hides from all but models.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u2064\u2066-\u2069\ufeff"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)
_NO_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
MAX_NAME = 64


def clean(text: str) -> str:
    """A text without characters that are never seen."""
    return _HIDDEN.sub("", text)


def clean_line(text: str, most: int) -> str:
    """The same as one line of at most so many characters."""
    line = " ".join(clean(text).split())
    return line if len(line) <= most else f"{line[: most - 2]} …"


def clean_name(text: str) -> str:
    """A name of plain letters, digits, dots, dashes and underscores."""
    return _NO_NAME.sub("_", text).strip("_")[:MAX_NAME] or "tool"


def clean_json(value: Any) -> Any:
    """Plain data whose texts and keys are clean."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [clean_json(each) for each in value]
    if isinstance(value, dict):
        return {clean(str(key)): clean_json(each) for key, each in value.items()}
    return value
