"""Checks a conversation as a caller gives it, once, and puts it into one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phimlx.errors import PromptError, shortened
from phimlx.prompt.media_parts import NAMES, ContentPart, read_parts
from phimlx.prompt.tools import ToolCall, read_calls, read_tools, tools_json

ROLES = ("system", "user", "assistant", "tool")
KEYS = ("role", "content", "tool_calls", "tools", "name", "tool_call_id")

EXAMPLE = 'A message is {"role": "system" | "user" | "assistant" | "tool", "content": "…"}.'


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    `content` is its text, and `parts` what it consists of where that is more than text. `tools` is
    the JSON text of a tool list, in a system message only; `tool_calls` are the calls that an
    assistant's turn ended in.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tools: str | None = None
    name: str | None = None
    tool_call_id: str | None = None
    parts: tuple[ContentPart, ...] = ()


def read_messages(messages: Sequence[Mapping[str, Any] | Message]) -> list[Message]:
    """The messages, checked; those that have been read already are taken as they are.

    Raises PromptError, naming the message by its index, where one is not a message.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise PromptError("The conversation must be a list of messages.", hint=EXAMPLE)
    if not messages:
        raise PromptError("The conversation is empty.", hint="Give at least one message.")
    return [_read(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _read(place: str, message: Any) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping):
        raise PromptError(f"{place} is not an object.", hint=EXAMPLE)
    given = {key: value for key, value in message.items() if value is not None}
    for key in given:
        if key not in KEYS:
            raise PromptError(
                f"{place} has the unknown key {shortened(key)}.",
                hint=f"Known keys: {', '.join(KEYS)}.",
            )
    role = given.get("role")
    if role not in ROLES:
        said = f"has the role {shortened(role)}" if "role" in given else "has no role"
        raise PromptError(f"{place} {said}; a role is one of {', '.join(ROLES)}.", hint=EXAMPLE)
    calls = _read_calls(place, role, given.get("tool_calls", ()))
    content = given.get("content", "" if calls else None)
    parts = _read_parts(place, role, content) if isinstance(content, list | tuple) else ()
    if parts:
        content = "".join(part.value for part in parts if part.kind == "text")
    if not isinstance(content, str):
        said = "whose content is not text" if "content" in given else "without content"
        raise PromptError(f"{place} is a message {said}.", hint=EXAMPLE)
    for key in ("name", "tool_call_id"):
        if not isinstance(given.get(key, ""), str):
            raise PromptError(f"{place} has a {shortened(key)} that is not text.", hint=EXAMPLE)
    return Message(
        role,
        content,
        calls,
        _read_tools(place, role, given.get("tools")),
        given.get("name"),
        given.get("tool_call_id"),
        parts if any(part.kind != "text" for part in parts) else (),
    )


def _read_parts(place: str, role: str, content: Sequence[Any]) -> tuple[ContentPart, ...]:
    parts = read_parts(place, content)
    for part in parts:
        if part.kind != "text" and role != "user":
            raise PromptError(
                f"{place} has a {NAMES[part.kind]}, which only a user's message can have.",
                hint="Put it into a message with the role user.",
            )
    return parts


def _read_calls(place: str, role: str, calls: Any) -> tuple[ToolCall, ...]:
    if not calls:
        return ()
    if role != "assistant":
        raise PromptError(
            f"{place} has tool_calls, which only an assistant's message can have.",
            hint="Give a tool's result as a message with the role tool.",
        )
    try:
        return tuple(read_calls(list(calls)))
    except (TypeError, ValueError) as error:
        raise PromptError(
            f"{place} has tool_calls that are no calls: {error}.",
            hint='A call is {"name": …, "arguments": {…}}.',
        ) from error


def _read_tools(place: str, role: str, tools: Any) -> str | None:
    if not tools:
        return None
    if role != "system":
        raise PromptError(
            f"{place} has tools, which only a system message can have.",
            hint="Put them into the system message, or give them beside the messages.",
        )
    return tools if isinstance(tools, str) else tools_json(read_tools(tools))
