"""A row -> what is to be learned from it: a conversation, a text, or a better and a worse reply."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phimlx.errors import PromptError, TrainingError, shortened
from phimlx.prompt.messages import Message, read_messages

# What a row's keys may be called otherwise; `role` and `content` are those of its messages.
FIELDS = (
    "messages",
    "tools",
    "system",
    "prompt",
    "completion",
    "text",
    "chosen",
    "rejected",
    "role",
    "content",
)
# ShareGPT's names for who speaks.
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
SHAREGPT = {"messages": "conversations", "role": "from", "content": "value"}

KNOWN = (
    "A row has messages, prompt and completion, or text; other names need a mapping, such as "
    "prompt=question."
)
KNOWN_PAIR = (
    "A row has prompt, chosen and rejected; other names need a mapping, such as chosen=better."
)


class RowError(TrainingError):
    """A row that cannot be learned from; the message does not name it."""


# A row's fault, whether this module finds it or reading messages and templates does.
ROW_FAULTS = (RowError, PromptError)


@dataclass(frozen=True)
class Conversation:
    """Messages, and the functions that the model is offered in them.

    `given`: how many of the messages are never to be learned, whoever speaks.
    """

    messages: list[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    given: int = 0


@dataclass(frozen=True)
class PlainText:
    """Text without turns, in which control tokens are recognised."""

    text: str


@dataclass(frozen=True)
class PreferencePair:
    """Two conversations with the same beginning, of which the first ends better."""

    chosen: Conversation
    rejected: Conversation


RowContent = Conversation | PlainText | PreferencePair


def check_mapping(mapping: Mapping[str, str]) -> None:
    """Raise TrainingError where a mapping names what no row has."""
    for name in mapping:
        if name not in FIELDS:
            raise TrainingError(
                f"The mapping names {shortened(name)}, which is nothing that a row has.",
                hint=f"What can be mapped: {', '.join(FIELDS)}.",
            )


def read_content(
    values: Mapping[str, Any], mapping: Mapping[str, str], preferences: bool = False
) -> RowContent:
    """Read what a row says.

    Its keys tell what it is: `messages` (or `conversations`), else `prompt` and `completion`, else
    `text`; with `preferences` it is `chosen` and `rejected`. A mapping tells it where it names one
    of these. Other keys are passed over. `messages` and `tools` may be the JSON text of a list, as
    they have to in CSV. A prompt or an answer is a text, which is one message, or a list of
    messages; `system` is a text that comes before all of them.

    Args:
        mapping: the row's own key by the name in `FIELDS`.

    Raises:
        RowError: with the reason.
    """
    row = _Fields(values, mapping)
    for needed, read in _PREFERENCE_READERS if preferences else _READERS:
        if any(name in mapping for name in needed) or row.has(*needed):
            return read(row)
    if preferences:
        raise _unknown(values, KNOWN_PAIR)
    if "conversations" in values:
        return _messages(_Fields(values, SHAREGPT | dict(mapping)))
    if row.has("chosen", "rejected"):
        raise RowError(
            "This is a better and a worse answer, which only training by preference takes.",
            hint="Train with --dpo, or name the answer: completion=chosen.",
        )
    raise _unknown(values, KNOWN)


def _unknown(values: Mapping[str, Any], known: str) -> RowError:
    return RowError(f"It has {_keys(values)}, from which nothing can be learned.", hint=known)


def _keys(values: Mapping[str, Any]) -> str:
    """A row's own keys, as they may stand in a message."""
    return ", ".join(shortened(key, 30) for key in list(values)[:8]) or "no keys at all"


@dataclass(frozen=True)
class _Fields:
    """A row's values under the names in `FIELDS`."""

    values: Mapping[str, Any]
    mapping: Mapping[str, str]
    names: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", {name: name for name in FIELDS} | dict(self.mapping))

    def has(self, *names: str) -> bool:
        return all(self.names[name] in self.values for name in names)

    def get(self, name: str) -> Any:
        """The value, or None where it is absent."""
        return self.values.get(self.names[name])

    def need(self, name: str) -> Any:
        key = self.names[name]
        if key not in self.values:
            raise RowError(f"It has no {key!r}, but {_keys(self.values)}.", hint=KNOWN)
        return self.values[key]

    def text(self, name: str) -> str:
        """A value that has to be text, and not an empty one."""
        value, key = self.need(name), self.names[name]
        if not isinstance(value, str):
            raise RowError(f"{key!r} is {shortened(value)}, not text.")
        if not value.strip():
            raise RowError(f"{key!r} is empty.")
        return value

    def listed(self, name: str) -> list[Any] | None:
        """A value that has to be a list, or JSON text of one; None where it is absent or empty."""
        value, key = self.get(name), self.names[name]
        if value is None or value == "":
            return None
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise RowError(f"{key!r} is text, but no JSON list.") from error
            if value is None:
                return None
        if not isinstance(value, list):
            raise RowError(f"{key!r} is {shortened(value)}, not a list.")
        return value

    def turns(self, name: str, role: str) -> list[Message]:
        """Messages, given as a list of them or as the text of one."""
        value = self.need(name)
        if isinstance(value, list):
            return self.messages(name, value)
        return [Message(role, self.text(name))]

    def messages(self, name: str, value: list[Any]) -> list[Message]:
        """The messages in a list, each checked as those that the model is asked are."""
        role, content = self.names["role"], self.names["content"]
        plain = []
        for message in value:
            if isinstance(message, Mapping):
                message = {
                    {role: "role", content: "content"}.get(key, key): item
                    for key, item in message.items()
                }
                said = message.get("role")
                message["role"] = ROLES.get(said, said) if isinstance(said, str) else said
            plain.append(message)
        read = read_messages(plain)
        for index, message in enumerate(read):
            if message.parts:
                raise RowError(
                    f"{self.names[name]}[{index}] has a picture or a sound; training takes text "
                    "alone."
                )
            says = message.content.strip() or message.tool_calls
            if message.role == "assistant" and not says:
                raise RowError(
                    f"{self.names[name]}[{index}] is a reply without text and without calls."
                )
        return read


def _messages(row: _Fields) -> Conversation:
    row.need("messages")
    listed = row.listed("messages")
    if listed is None:
        raise RowError(f"{row.names['messages']!r} is empty.")
    messages = row.messages("messages", listed)
    if row.get("system"):
        if messages[0].role == "system":
            raise RowError(f"It has a system message in its messages and {row.names['system']!r}.")
        messages.insert(0, Message("system", row.text("system")))
    return Conversation(messages, row.listed("tools"))


def _answer(row: _Fields) -> Conversation:
    asked = _question(row)
    return Conversation(
        [*asked, *row.turns("completion", "assistant")], row.listed("tools"), len(asked)
    )


def _question(row: _Fields) -> list[Message]:
    system = [Message("system", row.text("system"))] if row.get("system") else []
    return [*system, *row.turns("prompt", "user")]


def _text(row: _Fields) -> PlainText:
    return PlainText(row.text("text"))


def _pair(row: _Fields) -> PreferencePair:
    """Answers that are lists may hold the prompt as well, or be all that there is."""
    asked = _question(row) if row.has("prompt") else []
    tools = row.listed("tools")
    whole = []
    for name in ("chosen", "rejected"):
        said = row.turns(name, "assistant")
        if said[0].role == "assistant":
            said = [*asked, *said]
        elif any(message not in said for message in asked):
            raise RowError(f"The prompt is no part of {row.names[name]!r}.")
        whole.append(said)
    chosen, rejected = whole
    if chosen == rejected:
        raise RowError("The chosen and the rejected answer are the same.")
    shared = next(
        (i for i, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
        min(len(chosen), len(rejected)),
    )
    if not shared:
        raise RowError(
            "The chosen and the rejected answer belong to no common prompt.", hint=KNOWN_PAIR
        )
    return PreferencePair(*(Conversation(said, tools, shared) for said in whole))


_READERS: tuple[tuple[tuple[str, ...], Callable[[_Fields], RowContent]], ...] = (
    (("messages",), _messages),
    (("prompt", "completion"), _answer),
    (("text",), _text),
)
_PREFERENCE_READERS: tuple[tuple[tuple[str, ...], Callable[[_Fields], RowContent]], ...] = (
    (("chosen", "rejected"), _pair),
)
