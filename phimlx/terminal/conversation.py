"""A conversation: what was said, what is set, and how both are saved and read back.

Knows nothing of a screen or of how a model answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.errors import PhimlxError, SessionError
from phimlx.prompt.tools import read_tools
from phimlx.terminal.files import read_json, write_private
from phimlx.terminal.output import encode_json
from phimlx.terminal.settings import check_settings

if TYPE_CHECKING:
    from phimlx.generation.reply import Reply

Message = dict[str, Any]

FORMAT = "phimlx-chat"
VERSION = 1
_MESSAGE_KEYS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "reasoning", "tool_calls"},
    "tool": {"role", "content"},
}


@dataclass(frozen=True)
class Turn:
    """Messages that wait for an answer: the first `kept` of the conversation, then `new`."""

    kept: int
    new: tuple[Message, ...]


@dataclass
class Conversation:
    """Messages, settings and tools of one chat.

    A turn changes the messages only once there is an answer: `ask`, `answer_tools` or `retry`
    begin it, `record` ends it; `abandon` leaves all as it was and keeps what was asked for
    `retry`.
    """

    model: str
    messages: list[Message] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    unanswered: tuple[Message, ...] = ()

    @property
    def system(self) -> str | None:
        """The system prompt, where there is one."""
        if self.messages and self.messages[0]["role"] == "system":
            return str(self.messages[0]["content"])
        return None

    @system.setter
    def system(self, text: str | None) -> None:
        said = self.messages if self.system is None else self.messages[1:]
        self.messages = [*([] if text is None else [{"role": "system", "content": text}]), *said]

    def ask(self, text: str) -> Turn:
        """Begin a turn with what the user says."""
        return Turn(len(self.messages), ({"role": "user", "content": text},))

    def answer_tools(self, results: Sequence[str]) -> Turn:
        """Begin a turn with the results of the tools that the model called, in its order."""
        return Turn(
            len(self.messages), tuple({"role": "tool", "content": result} for result in results)
        )

    def retry(self) -> Turn:
        """Begin the last turn again: one that has no answer, else the one answered last.

        Raises `SessionError` where nothing was asked.
        """
        if self.unanswered:
            return Turn(len(self.messages), self.unanswered)
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise SessionError("There is nothing to retry.")
        return Turn(len(self.messages) - 1, ())

    def prompt(self, turn: Turn) -> list[Message]:
        """The messages that the model is to answer; earlier reasoning is not sent again."""
        return [
            {key: value for key, value in message.items() if key != "reasoning"}
            for message in (*self.messages[: turn.kept], *turn.new)
        ]

    def record(self, turn: Turn, reply: Reply) -> None:
        """End `turn` with its answer."""
        answer: Message = {"role": "assistant", "content": reply.text}
        if reply.reasoning:
            answer["reasoning"] = reply.reasoning
        if reply.tool_calls:
            answer["tool_calls"] = [
                {"name": call.name, "arguments": call.arguments} for call in reply.tool_calls
            ]
        self.messages = [*self.messages[: turn.kept], *turn.new, answer]
        self.unanswered = ()

    def abandon(self, turn: Turn) -> None:
        """End `turn` without an answer; `retry` begins it again."""
        self.unanswered = turn.new

    def undo(self) -> str:
        """Take back the last thing the user said and all that came of it; return it.

        Raises `SessionError` where the user has said nothing.
        """
        if self.unanswered and self.unanswered[0]["role"] == "user":
            text, self.unanswered = self.unanswered[0]["content"], ()
            return str(text)
        for index in range(len(self.messages) - 1, -1, -1):
            if self.messages[index]["role"] == "user":
                text = self.messages[index]["content"]
                del self.messages[index:]
                self.unanswered = ()
                return str(text)
        raise SessionError("There is nothing to undo.")

    def clear(self) -> None:
        """Forget what was answered; the system prompt, settings and tools stay.

        A message without answer stays for `retry` too: it may be why there was no room.
        """
        self.messages = self.messages[: 0 if self.system is None else 1]
        self.unanswered = tuple(new for new in self.unanswered if new["role"] == "user")

    def save(self, path: Path, replace: bool = False) -> None:
        """Write the conversation to `path`, as a whole, for its owner alone.

        Raises `SessionError` where that fails, or where the file is there and not `replace`.
        """
        if not replace and path.exists():
            raise SessionError(f"{path} exists already.", "Choose another name, or remove it.")
        session = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "settings": self.settings,
            "tools": self.tools,
            "messages": self.messages,
        }
        write_private(path, encode_json(session, indent=2) + "\n", SessionError)

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read a conversation that `save` wrote.

        Raises `SessionError` that says what is wrong with the file.
        """
        session = read_json(path, SessionError)
        if not isinstance(session, dict) or session.get("format") != FORMAT:
            raise SessionError(f"{path} is not a saved chat.")
        if session.get("version") != VERSION:
            raise SessionError(
                f"{path} has version {session.get('version')!r} of the format; "
                f"this phimlx reads version {VERSION}."
            )
        try:
            return cls(
                model=_expect(session, "model", str),
                messages=_check_messages(_expect(session, "messages", list)),
                settings=check_settings(_expect(session, "settings", dict)),
                tools=read_tools(session["tools"]) if session.get("tools") else None,
            )
        except PhimlxError as error:
            raise SessionError(f"{path} is damaged: {error}") from None


def _expect(session: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    value = session.get(key)
    if not isinstance(value, kind):
        raise SessionError(f"{key} is missing or of the wrong type.")
    return value


def _check_messages(messages: list[Any]) -> list[Message]:
    for index, message in enumerate(messages):
        problem = _problem(message, first=index == 0)
        if problem:
            raise SessionError(f"message {index + 1} {problem}.")
    return messages


def _problem(message: Any, first: bool) -> str | None:
    if not isinstance(message, dict):
        return "is not an object"
    role = message.get("role")
    if not isinstance(role, str) or role not in _MESSAGE_KEYS:
        return f"has the unknown role {role!r}"
    if role == "system" and not first:
        return "is a system prompt that does not come first"
    if not isinstance(message.get("content"), str):
        return "has no text as its content"
    unknown = sorted(set(message) - _MESSAGE_KEYS[role])
    if unknown:
        return f"has the unknown field {unknown[0]!r}"
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
