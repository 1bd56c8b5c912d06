"""Turns of a conversation, shown as they were said."""

from __future__ import annotations

from collections.abc import Sequence

from phimlx.history.messages import Message, text_of
from phimlx.terminal.output import Output, encode_json

LABELS = {"user": "» ", "tool": "= "}  # apart from the prompt, which is >


def show_turns(messages: Sequence[Message], output: Output, last: int | None = None) -> None:
    """Show messages beside the replies; of the last turns alone where `last` says how many."""
    begins = [index for index, message in enumerate(messages) if message["role"] == "user"]
    start = 0
    if last is not None and len(begins) > last:
        start = begins[-last]
        output.note(f"… {start} messages before")
    for message in messages[start:]:
        for line in lines_of(message):
            output.note(line, style_name=None if message["role"] == "assistant" else "cyan")


def lines_of(message: Message) -> list[str]:
    """Return the lines of one message, each call of a tool as one."""
    if message["role"] == "system":
        return [f"System prompt: {message['content']}"]
    label = LABELS.get(message["role"], "")
    text = text_of(message["content"])
    calls = [
        f"→ {call['name']} {encode_json(call['arguments'])}"
        for call in message.get("tool_calls", ())
    ]
    return [*([label + text] if text else []), *calls]
