"""Keeps a chat in the history while it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phimlx.errors import HistoryError
from phimlx.history.messages import Message
from phimlx.history.store import History
from phimlx.terminal.conversation import Conversation
from phimlx.terminal.output import Output


class Keeper:
    """Writes down a conversation after each change, until that fails: a chat goes on without."""

    def __init__(self, history: History, output: Output) -> None:
        self.history = history
        self._output = output
        self._failed = False

    def keep(
        self,
        conversation: Conversation,
        asked: Sequence[Message] = (),
        stats: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the history what the conversation is now.

        Args:
            asked: what waits for an answer.
            stats: what the last answer took.
        """
        said = conversation.messages[0 if conversation.system is None else 1 :]
        messages = [*said, *asked]
        if self._failed or (conversation.place is None and not messages):
            return
        before = conversation.place
        try:
            conversation.place = self.history.put(before, conversation.head(), messages, stats)
        except HistoryError as error:
            self._output.warning(f"what is said from here on is not kept. {error}")
            self._failed = True
            return
        if before is not None and before.id != conversation.place.id:
            self._output.note(
                f"Conversation {before.id} went on elsewhere; this chat is kept as "
                f"{conversation.place.id}."
            )
