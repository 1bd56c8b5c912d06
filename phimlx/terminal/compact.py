"""Older turns of a chat, replaced by the model's own summary of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phimlx.errors import SessionError
from phimlx.terminal.conversation import Turn
from phimlx.terminal.interrupt import Interruptible

if TYPE_CHECKING:
    from phimlx.terminal.chat import Chat

KEPT_TURNS = 2  # that stay as they were said
SHARE = 8  # of the context that a summary may fill: one in so many
ASK = (
    "Sum up our conversation so far, for yourself to go on from: what was asked, what was found, "
    "names, numbers and decisions, in short sentences. Say nothing else."
)
QUESTION = "What have we said so far?"


def compact(chat: Chat) -> int:
    """Let the model sum up the oldest turns; return how many messages the summary stands for.

    It is shown before it counts, and on a terminal only counts where that is agreed to. 0 where it
    does not. The history keeps the conversation as it was; what follows is another one.

    Raises:
        SessionError: where there is too little to sum up, or nothing came of it.
    """
    conversation = chat.conversation
    begins = conversation.turn_begins()
    if len(begins) < 2:
        raise SessionError("There is too little to sum up: it takes two turns.")
    cut = begins[-min(KEPT_TURNS, len(begins) - 1)]
    asked = Turn(cut, ({"role": "user", "content": ASK},))
    settings = {
        **conversation.settings,
        "max_tokens": max(1, chat.phi.context_length // SHARE),
        "stop": (),
    }
    with chat.output.prompt_progress() as report:
        stream = chat.phi.stream(
            conversation.prompt(asked), cache=chat.cache, on_prefill=report, **settings
        )
        answer = Interruptible(stream)
        reply = chat.screen.show(answer)
    if answer.cut:
        chat.forget()
    summary = reply.text.strip()
    if answer.interrupted or not summary:
        raise SessionError("No summary came of it; the conversation stays as it was.")
    first = begins[0]
    count = cut - first
    if chat.screen.interactive and not chat.screen.agree(
        f"Let this stand for the {count} oldest messages?"
    ):
        return 0
    conversation.replace_oldest(
        cut,
        [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": summary},
        ],
    )
    return count
