"""What a tool gives back, as text that a model may read."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CHARACTERS = 20_000  # of one result: some 5,000 tokens


@dataclass(frozen=True)
class ToolResult:
    """What came of a call: a text for the model, and whether it tells of a failure."""

    text: str
    failed: bool = False


def capped(text: str, most: int = MAX_CHARACTERS) -> str:
    """A text as far as there is room for it, and how much that was; no halves of surrogates."""
    whole = text.encode("utf-8", "replace").decode()
    if len(whole) <= most:
        return whole
    return f"{whole[:most]}\n[The first {most:,} of {len(whole):,} characters.]"


def error_text(error: BaseException) -> str:
    """An error as the model is told of it."""
    said = f"{type(error).__name__}: {error}".removesuffix(": ")
    return capped(f"Error: {said}")
