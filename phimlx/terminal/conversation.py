"""A conversation: what was said, what is set, and how both are saved and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.errors import MediaError, PhimlxError, SessionError, clipped, shortened
from phimlx.files import read_json_value, translate_write_errors, write_file
from phimlx.history.messages import (
    FORMAT,
    KINDS,
    VERSION,
    Message,
    check_messages,
    files_of,
    text_of,
)
from phimlx.preferences.sampling import SETTINGS, check_settings
from phimlx.prompt.tools import load_tools, read_tools
from phimlx.sizes import counted
from phimlx.terminal.attachments import Attachment, digest, in_order
from phimlx.terminal.output import encode_json

if TYPE_CHECKING:
    from phimlx.generation.reply import Reply
    from phimlx.history.records import Head, Kept, Place
    from phimlx.media.limits import Limits
    from phimlx.preferences.personas import Persona


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

    `place` is where the history keeps it; None until it does.
    """

    model: str
    messages: list[Message] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    unanswered: tuple[Message, ...] = ()
    adapter: str | None = None
    attachments: dict[str, Attachment] = field(default_factory=dict, compare=False, repr=False)
    place: Place | None = field(default=None, compare=False)

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
        return any(map(files_of, self.messages))

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
        answer = reply.as_message()
        if reply.reasoning:
            answer["reasoning"] = reply.reasoning
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
                self.messages = self.messages[:index]
                self.unanswered = ()
                return text
        raise SessionError("There is nothing to undo.")

    def turn_begins(self) -> list[int]:
        """Return where in the messages each turn begins: at what the user said."""
        return [index for index, each in enumerate(self.messages) if each["role"] == "user"]

    def replace_oldest(self, cut: int, messages: Sequence[Message] = ()) -> None:
        """Put others in the place of the messages before `cut`, a system prompt apart.

        The history keeps what there was; what follows is another conversation.
        """
        first = 0 if self.system is None else 1
        self.messages = [*self.messages[:first], *messages, *self.messages[cut:]]
        self.place = None
        self._drop_attachments()

    def drop_oldest(self, turns: int) -> None:
        """Forget the oldest turns; raises `SessionError` where there are not so many."""
        begins = self.turn_begins()
        if not 0 < turns <= len(begins):
            verb = "is" if len(begins) == 1 else "are"
            raise SessionError(f"There {verb} {counted(len(begins), 'turn')} to drop from.")
        self.replace_oldest([*begins, len(self.messages)][turns])

    def edit(self, text: str) -> Turn:
        """Begin the last thing the user said again, in other words, with the files it had.

        Raises `SessionError` where the user has said nothing.
        """
        said = next((each for each in reversed(self.unanswered) if each["role"] == "user"), None)
        begins = self.turn_begins()
        if said is None and begins:
            said = self.messages[begins[-1]]
        self.undo()
        assert said is not None
        files = files_of(said)
        content: Any = [*files, *([{"type": "text", "text": text}] if text else [])]
        return Turn(len(self.messages), ({"role": "user", "content": content if files else text},))

    def last_said(self) -> str:
        """Return the text of the last thing the user said; raises `SessionError` without one."""
        for message in reversed([*self.messages, *self.unanswered]):
            if message["role"] == "user":
                content = message["content"]
                parts = (
                    content if isinstance(content, list) else [{"type": "text", "text": content}]
                )
                return "\n".join(part["text"] for part in parts if part["type"] == "text")
        raise SessionError("You have said nothing yet.")

    def wear(self, persona: Persona) -> None:
        """Take a persona's system prompt, settings and tools; raises `PromptError` for the last."""
        self.settings |= {
            setting.keyword: persona.get(setting.keyword)
            for setting in SETTINGS
            if persona.get(setting.keyword) is not None
        }
        if persona.get("system") is not None:
            self.system = persona.get("system")
        if persona.tools is not None:
            self.tools = load_tools(persona.tools)

    def clear(self) -> None:
        """Forget what was answered; the system prompt, settings and tools stay.

        A message without answer stays for `retry` too: it may be why there was no room. What the
        history keeps stays there; what follows is another conversation.
        """
        self.place = None
        self.messages = self.messages[: 0 if self.system is None else 1]
        self.unanswered = tuple(new for new in self.unanswered if new["role"] == "user")
        self._drop_attachments()

    def _drop_attachments(self) -> None:
        """Forget what the model was given for files that no message has any more."""
        held = (*self.messages, *self.unanswered)
        kept = {_key(part) for message in held for part in files_of(message)}
        self.attachments = {key: each for key, each in self.attachments.items() if key in kept}

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
            "adapter": self.adapter,
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
        return cls._restore(session, str(path), limits, agree)

    @classmethod
    def from_history(
        cls,
        kept: Kept,
        limits: Limits | None = None,
        agree: Callable[[str], bool] = lambda question: False,
    ) -> Conversation:
        """Make what the history keeps into a conversation that goes on; errors as of `load`.

        What has no answer is there for `retry`.
        """
        from phimlx.history.export import session_object

        place = f"Conversation {kept.place.id}"
        conversation = cls._restore(session_object(kept), place, limits, agree)
        said = conversation.messages
        answered = next(
            (
                index + 1
                for index in range(len(said) - 1, -1, -1)
                if said[index]["role"] in ("assistant", "system")
            ),
            0,
        )
        conversation.messages, conversation.unanswered = said[:answered], tuple(said[answered:])
        conversation.place = kept.place
        return conversation

    def head(self) -> Head:
        """Return what the history keeps of it beside its messages."""
        from phimlx.history.records import Head

        return Head(self.model, self.adapter, self.system, self.settings, self.tools)

    @classmethod
    def _restore(
        cls,
        session: Mapping[str, Any],
        place: str,
        limits: Limits | None,
        agree: Callable[[str], bool],
    ) -> Conversation:
        try:
            conversation = cls(
                model=_expect(session, "model", str),
                messages=check_messages(_expect(session, "messages", list)),
                settings=check_settings(_expect(session, "settings", dict)),
                tools=read_tools(session["tools"]) if session.get("tools") else None,
                adapter=_expect({"adapter": None, **session}, "adapter", str | None),
            )
        except PhimlxError as error:
            raise SessionError(f"{place} is damaged: {error}") from None
        parts = {
            _key(part): part for message in conversation.messages for part in files_of(message)
        }
        _ask_to_fetch(place, [part["path"] for part in parts.values()], agree)
        conversation.attachments = {
            key: _read_again(place, part, limits) for key, part in parts.items()
        }
        return conversation


def _key(part: Mapping[str, Any]) -> str:
    return f"{part['type']} {part['sha256']} {part.get('frames')}"


def _ask_to_fetch(session: str, places: Sequence[str], agree: Callable[[str], bool]) -> None:
    from phimlx.media.limits import source_name
    from phimlx.media.source import is_url

    addresses = [source_name(place) for place in dict.fromkeys(places) if is_url(place)]
    if addresses and not agree(f"Fetch {', '.join(addresses)}, which {session} shows?"):
        raise SessionError(
            f"{session} shows {addresses[0]}, which is fetched only where somebody agrees to it.",
            "Load it on a terminal, which asks, or begin a new chat.",
        )


def _read_again(session: str, part: Mapping[str, Any], limits: Limits | None) -> Attachment:
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


def _expect(session: Mapping[str, Any], key: str, kind: Any) -> Any:
    value = session.get(key)
    if not isinstance(value, kind):
        raise SessionError(f"{key} is missing or of the wrong type.")
    return value
