"""What the history gives and takes: conversations, their messages and what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from phimlx.history.messages import Message


class Place(NamedTuple):
    """Where a conversation is kept: its number, and the revision that a writer knows."""

    id: int
    revision: int


@dataclass(frozen=True)
class Head:
    """What a conversation is, apart from its messages.

    Attributes:
        model: its alias, Hub id or folder.
        adapter: folder or Hub id of an adapter.
        system: the system prompt, which is no message here.
        settings: of sampling, by keyword.
        tools: definitions of functions that the model may call.
    """

    model: str
    adapter: str | None = None
    system: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] | None = None

    def columns(self) -> dict[str, Any]:
        """Return what the columns of the same names hold."""
        return {
            "model": writable(self.model),
            "adapter": self.adapter and writable(self.adapter),
            "system": None if self.system is None else encode(self.system),
            "settings": encode(dict(self.settings)),
            "tools": None if self.tools is None else encode(list(self.tools)),
        }


@dataclass(frozen=True)
class Entry:
    """A message as it is kept: with the model that said it, what that took, and when."""

    message: Message
    model: str | None
    stats: dict[str, Any] | None
    created: float


@dataclass(frozen=True)
class Summary:
    """A conversation in a list. Times are seconds since 1970."""

    id: int
    title: str
    model: str
    messages: int
    created: float
    updated: float


@dataclass(frozen=True)
class Kept:
    """A whole conversation."""

    place: Place
    about: Summary
    head: Head
    entries: list[Entry]

    @property
    def messages(self) -> list[Message]:
        """The messages, the system prompt first where there is one."""
        system = self.head.system
        first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        return [*first, *(entry.message for entry in self.entries)]


@dataclass(frozen=True)
class Match:
    """A message in which something was found, and the text around it."""

    conversation: Summary
    position: int
    role: str
    excerpt: str


def encode(value: Any) -> str:
    """Encode JSON in ASCII: halves of surrogates, which SQLite does not take, are escaped."""
    return json.dumps(value)


def decode(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def writable(text: str) -> str:
    """A text as SQLite takes it, halves of surrogates replaced."""
    return text.encode("utf-8", "replace").decode()
