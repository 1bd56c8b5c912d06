"""One question put to a model by `generate`, and how the history keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.errors import MediaError
from phimlx.history.messages import Message
from phimlx.terminal.attachments import Attachment, digest
from phimlx.terminal.conversation import Conversation, Turn

if TYPE_CHECKING:
    from phimlx.generation.reply import Reply
    from phimlx.media.limits import Limits
    from phimlx.terminal.keeper import Keeper

OPTIONS = {"image": "images", "audio": "audio", "video": "video"}

File = tuple[str, str | bytes]
"""The kind of a file that goes with a question, and its path, URL or contents."""


@dataclass
class Exchange:
    """A question and its answer.

    Attributes:
        messages: what the model is given.
        media: options of `Phi.stream` for the files that go with the question.
        keeper: None where nothing is kept.
    """

    conversation: Conversation
    turn: Turn
    messages: list[Message]
    media: dict[str, Any]
    keeper: Keeper | None

    @classmethod
    def first(
        cls,
        conversation: Conversation,
        text: str,
        files: Sequence[File],
        limits: Limits,
        frames: int,
        keeper: Keeper | None,
    ) -> Exchange:
        """Begin a conversation; the model reads the files.

        One with a file that cannot be told again by its digest, such as that of an address or of
        contents alone, is not kept.
        """
        turn = conversation.ask(text)
        messages = conversation.prompt(turn)
        media: dict[str, Any] = {}
        if files:
            media = {
                name: [path for of, path in files if of == kind] for kind, name in OPTIONS.items()
            }
            media |= {"frames": frames, "limits": limits}
            parts = (
                None if keeper is None else [saved_part(*file, limits, frames) for file in files]
            )
            if parts is None or None in parts:
                keeper = None
            content = [*(parts or ()), *([{"type": "text", "text": text}] if text else [])]
            turn = Turn(turn.kept, ({"role": "user", "content": content},))
        return cls(conversation, turn, messages, media, keeper)

    @classmethod
    def next(
        cls,
        conversation: Conversation,
        text: str,
        files: Sequence[File],
        limits: Limits,
        frames: int,
        keeper: Keeper | None,
    ) -> Exchange:
        """Go on with a conversation; raises `MediaError` for a file that cannot be read."""
        named = [(kind, path) for kind, path in files if isinstance(path, str)]
        read = [Attachment.read(kind, path, limits, frames) for kind, path in named]
        turn = conversation.ask(text, read)
        return cls(conversation, turn, conversation.prompt(turn), {}, keeper)

    def keep_question(self) -> None:
        """Keep what was asked, before the answer is there."""
        if self.keeper is not None:
            self.keeper.keep(self.conversation, self.turn.new)

    def keep_answer(self, reply: Reply, stats: dict[str, Any]) -> None:
        """Keep the answer."""
        if self.keeper is not None:
            self.conversation.record(self.turn, reply)
            self.keeper.keep(self.conversation, stats=stats)


def saved_part(kind: str, path: str | bytes, limits: Limits, frames: int) -> dict[str, Any] | None:
    """Return the part that stands for a file where a chat is kept; None for one without a path."""
    from phimlx.media.source import is_url, read_bytes

    if isinstance(path, bytes) or is_url(path):
        return None
    try:
        sha256 = digest(read_bytes(path, limits))
    except MediaError:  # which the model will raise, and say
        return None
    count = frames if kind == "video" else None
    return Attachment(kind, str(Path(path).absolute()), sha256, count, (), "").saved
