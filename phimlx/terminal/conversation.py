"""A conversation: what was said, what is set, and how both are saved and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.errors import MediaError, PhimlxError, SessionError, clipped, shortened
from phimlx.files import read_json_value, translate_write_errors, write_file
from phimlx.prompt.tools import read_tools
from phimlx.terminal.attachments import KINDS, Attachment, digest, in_order
from phimlx.terminal.output import encode_json
from phimlx.terminal.sampling_settings import check_settings

if TYPE_CHECKING:
    from phimlx.generation.reply import Reply
    from phimlx.media.limits import Limits

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

    The content of a user's message is a text, or a list of parts where files go with it: those
    name a file and its digest; `attachments` holds what the model is given for it.

    A turn changes the messages only once there is an answer: `ask`, `answer_tools` or `retry`
    begin it, `record` ends it; `abandon` leaves all as it was and keeps what was asked for
    `retry`.
    """

    model: str
    messages: list[Message] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    unanswered: tuple[Message, ...] = ()
    attachments: dict[str, Attachment] = field(default_factory=dict, compare=False, repr=False)

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

    @property
    def has_media(self) -> bool:
        """Tell whether pictures or sounds were shown."""
        return any(map(_files, self.messages))

    def ask(self, text: str, attachments: Sequence[Attachment] = ()) -> Turn:
        """Begin a turn with what the user says, and the files that go with it."""
        content: Any = text
        if attachments:
            content = [attachment.saved for attachment in in_order(attachments)]
            content += [{"type": "text", "text": text}] if text else []
        for attachment in attachments:
            self.attachments[_key(attachment.saved)] = attachment
        return Turn(len(self.messages), ({"role": "user", "content": content},))

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
        """Return the messages that the model is to answer; earlier reasoning is not sent again."""
        return [
            {key: value for key, value in message.items() if key != "reasoning"}
            | {"content": self._given(message["content"])}
            for message in (*self.messages[: turn.kept], *turn.new)
        ]

    def _given(self, content: Any) -> Any:
        """Content as the model gets it: what the files hold in place of their names."""
        if not isinstance(content, list):
            return content
        given: list[dict[str, Any]] = []
        for part in content:
            given += [part] if part["type"] == "text" else self.attachments[_key(part)].parts
        return given

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
            text, self.unanswered = text_of(self.unanswered[0]["content"]), ()
            return text
        for index in range(len(self.messages) - 1, -1, -1):
            if self.messages[index]["role"] == "user":
                text = text_of(self.messages[index]["content"])
                del self.messages[index:]
                self.unanswered = ()
                return text
        raise SessionError("There is nothing to undo.")

    def clear(self) -> None:
        """Forget what was answered; the system prompt, settings and tools stay.

        A message without answer stays for `retry` too: it may be why there was no room.
        """
        self.messages = self.messages[: 0 if self.system is None else 1]
        self.unanswered = tuple(new for new in self.unanswered if new["role"] == "user")
        kept = {_key(part) for message in self.unanswered for part in _files(message)}
        self.attachments = {key: self.attachments[key] for key in kept}

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
        with translate_write_errors(path, SessionError):
            write_file(path, encode_json(session, indent=2) + "\n", private=True)

    @classmethod
    def load(
        cls,
        path: Path,
        limits: Limits | None = None,
        agree: Callable[[str], bool] = lambda question: False,
    ) -> Conversation:
        """Read a conversation that `save` wrote, and the files that go with it.

        Args:
            agree: asked, with a question, before anything is fetched from an address that the
                file names: whoever made the file chose it.

        Raises:
            SessionError: says what is wrong with the file, or with one of those that go with it.
        """
        session = read_json_value(path, SessionError)
        if not isinstance(session, dict) or session.get("format") != FORMAT:
            raise SessionError(f"{path} is not a saved chat.")
        if session.get("version") != VERSION:
            raise SessionError(
                f"{path} has version {shortened(session.get('version'))} of the format; "
                f"this phimlx reads version {VERSION}."
            )
        try:
            conversation = cls(
                model=_expect(session, "model", str),
                messages=_check_messages(_expect(session, "messages", list)),
                settings=check_settings(_expect(session, "settings", dict)),
                tools=read_tools(session["tools"]) if session.get("tools") else None,
            )
        except PhimlxError as error:
            raise SessionError(f"{path} is damaged: {error}") from None
        parts = {_key(part): part for message in conversation.messages for part in _files(message)}
        _ask_to_fetch(path, [part["path"] for part in parts.values()], agree)
        conversation.attachments = {
            key: _read_again(path, part, limits) for key, part in parts.items()
        }
        return conversation


def text_of(content: Any) -> str:
    """Return the text of a message, files that go with it as their names."""
    if isinstance(content, str):
        return content
    return "\n".join(
        part["text"] if part["type"] == "text" else f"[{KINDS[part['type']]} {part['path']}]"
        for part in content
    )


def _files(message: Message) -> list[dict[str, Any]]:
    """The parts of a message that stand for files."""
    content = message["content"]
    parts = content if isinstance(content, list) else []
    return [part for part in parts if part["type"] != "text"]


def _key(part: Mapping[str, Any]) -> str:
    return f"{part['type']} {part['sha256']} {part.get('frames')}"


def _ask_to_fetch(session: Path, places: Sequence[str], agree: Callable[[str], bool]) -> None:
    from phimlx.media.limits import source_name
    from phimlx.media.source import is_url

    addresses = [source_name(place) for place in dict.fromkeys(places) if is_url(place)]
    if addresses and not agree(f"Fetch {', '.join(addresses)}, which {session} shows?"):
        raise SessionError(
            f"{session} shows {addresses[0]}, which is fetched only where somebody agrees to it.",
            "Load it on a terminal, which asks, or begin a new chat.",
        )


def _read_again(session: Path, part: Mapping[str, Any], limits: Limits | None) -> Attachment:
    from phimlx.media.source import read_bytes

    kind, place = part["type"], part["path"]
    try:
        data = read_bytes(place, limits)
        if digest(data) == part["sha256"]:  # else no decoder sees it
            return Attachment.decode(kind, place, data, limits, part.get("frames"))
    except MediaError as error:
        raise SessionError(
            f"{session} shows a {KINDS[kind]} that cannot be read again. {error}",
            f"Put {clipped(place)} back, or begin a new chat.",
        ) from error
    raise SessionError(
        f"{session} shows {place}, which has changed since.",
        "Put the file back as it was, or begin a new chat.",
    )


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
