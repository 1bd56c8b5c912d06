"""The form of messages that are kept, in the database and in files that `/save` writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phimlx.errors import SessionError, shortened

Message = dict[str, Any]

FORMAT = "phimlx-chat"
VERSION = 1

KINDS = {"image": "picture", "audio": "sound", "video": "video"}
"""Kinds of files that go with a message, and their names for people."""

_MESSAGE_KEYS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "reasoning", "tool_calls"},
    "tool": {"role", "content"},
}


def text_of(content: Any) -> str:
    """Return the text of a message, files that go with it as their names."""
    if isinstance(content, str):
        return content
    return "\n".join(
        part["text"] if part["type"] == "text" else f"[{KINDS[part['type']]} {part['path']}]"
        for part in content
    )


def files_of(message: Message) -> list[dict[str, Any]]:
    """Return the parts of a message that stand for files."""
    content = message["content"]
    parts = content if isinstance(content, list) else []
    return [part for part in parts if part["type"] != "text"]


def check_messages(messages: Sequence[Any], system: bool = True) -> list[Message]:
    """Return messages as they are; raises `SessionError` that names the first with a fault.

    Args:
        system: whether the first may be a system prompt.
    """
    for index, message in enumerate(messages):
        problem = _problem(message, first=system and index == 0)
        if problem:
            raise SessionError(f"message {index + 1} {problem}.")
    return list(messages)


def _problem(message: Any, first: bool) -> str | None:
    if not isinstance(message, dict):
        return "is not an object"
    role = message.get("role")
    if not isinstance(role, str) or role not in _MESSAGE_KEYS:
        return f"has the unknown role {shortened(role)}"
    if role == "system" and not first:
        return "is a system prompt that does not come first"
    content = message.get("content")
    if isinstance(content, list) and role == "user":
        if not content or not all(map(_is_part, content)):
            return "has parts that are neither texts nor files"
    elif not isinstance(content, str):
        return "has no text as its content"
    unknown = sorted(set(message) - _MESSAGE_KEYS[role])
    if unknown:
        return f"has the unknown field {shortened(unknown[0])}"
    if not isinstance(message.get("reasoning", ""), str):
        return "has reasoning that is not text"
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(
        isinstance(call, dict)
        and set(call) == {"name", "arguments"}
        and isinstance(call["name"], str)
        and isinstance(call["arguments"], dict)
        for call in calls
    ):
        return "has tool calls that are not a list of names and arguments"
    return None


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    if kind == "text":
        return set(part) == {"type", "text"} and isinstance(part["text"], str)
    keys = {"type", "path", "sha256", *(["frames"] if kind == "video" else [])}
    frames = part.get("frames", 1)
    return (
        isinstance(kind, str)
        and kind in KINDS
        and set(part) == keys
        and isinstance(part["path"], str)
        and isinstance(part["sha256"], str)
        and type(frames) is int
        and frames > 0
    )
