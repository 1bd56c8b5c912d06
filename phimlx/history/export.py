"""A conversation as a file: an object that `chat --load` reads, or Markdown for people."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from phimlx.errors import HistoryError
from phimlx.history.messages import FORMAT, VERSION, Message, files_of, text_of
from phimlx.history.records import Kept, Match, Summary, writable

NAMES = {"system": "System prompt", "user": "You", "tool": "Result"}


def moment(seconds: float) -> str:
    """Write a time as ISO 8601 has it, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def summary_object(about: Summary) -> dict[str, Any]:
    """Make the object of JSON of a conversation in a list."""
    return {**vars(about), "created": moment(about.created), "updated": moment(about.updated)}


def match_object(match: Match) -> dict[str, Any]:
    """Make the object of JSON of something found."""
    found = {"position": match.position, "role": match.role, "excerpt": match.excerpt}
    return {**summary_object(match.conversation), **found}


def session_object(kept: Kept) -> dict[str, Any]:
    """Make the object that `/save` writes, and beside it what the history knows more."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": kept.head.model,
        "adapter": kept.head.adapter,
        "settings": dict(kept.head.settings),
        "tools": kept.head.tools,
        "messages": kept.messages,
        "history": {
            **summary_object(kept.about),
            "messages": [
                {"model": entry.model, "stats": entry.stats, "created": moment(entry.created)}
                for entry in kept.entries
            ],
        },
    }


def markdown(kept: Kept) -> str:
    """Write a conversation as Markdown: a heading for each message, reasoning as a quotation."""
    about = kept.about
    lines = [f"# {about.title or f'Conversation {about.id}'}", ""]
    lines += [f"{kept.head.model}, {moment(about.created)}", ""]
    models = [None] * (len(kept.messages) - len(kept.entries))
    models += [entry.model for entry in kept.entries]  # type: ignore[misc]
    for message, model in zip(kept.messages, models, strict=True):
        lines += [f"## {NAMES.get(message['role']) or model or 'Assistant'}", ""]
        if message.get("reasoning"):
            lines += [*(f"> {line}".rstrip() for line in message["reasoning"].splitlines()), ""]
        text = text_of(message["content"]).strip()
        lines += [text, ""] if text else []
        for call in message.get("tool_calls", ()):
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            lines += [f"`{call['name']} {arguments}`", ""]
    return "\n".join(lines)


def training_row(kept: Kept) -> dict[str, Any]:
    """Make a row of training data: the messages up to the last reply, and the tools.

    Raises `HistoryError` that says why training could not take the conversation.
    """
    messages = kept.messages
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    if not messages:
        raise HistoryError("nothing was answered in it")
    if any(files_of(message) for message in messages):
        raise HistoryError("pictures, sounds or videos are in it, and training takes text alone")
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles[0] == "assistant":
        raise HistoryError("it begins with a reply")
    for message in messages:
        if message["role"] == "assistant" and not (
            text_of(message["content"]).strip() or message.get("tool_calls")
        ):
            raise HistoryError("a reply in it is empty")
    row: dict[str, Any] = {"messages": list(map(_training_message, messages))}
    return row | ({"tools": list(kept.head.tools)} if kept.head.tools else {})


def _training_message(message: Message) -> dict[str, Any]:
    found = {"role": message["role"], "content": writable(text_of(message["content"]))}
    if message.get("reasoning"):
        found["reasoning_content"] = writable(message["reasoning"])
    if message.get("tool_calls"):
        found["tool_calls"] = message["tool_calls"]
    return found
