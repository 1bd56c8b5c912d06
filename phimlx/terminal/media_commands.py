"""What goes with a message of a chat: files, the clipboard, and what is spoken."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from phimlx.errors import PhimlxError
from phimlx.prompt.media_parts import no_media
from phimlx.terminal.attachments import Attachment, split_name

if TYPE_CHECKING:
    from phimlx.terminal.chat import Chat


def attach(kind: str) -> Callable[[Chat, str], None]:
    """Make the command that attaches a file of that kind, and sends a text with it."""

    def command(chat: Chat, argument: str) -> None:
        name, text = split_name(argument)
        chat.attach([(kind, name)])
        if text:
            chat.say(text)

    return command


def paste(chat: Chat, text: str) -> None:
    """Attach what the clipboard holds, and send a text with it.

    Raises `PhimlxError` where it is nothing to attach.
    """
    if not chat.phi.takes_media:
        raise no_media(chat.phi.name)
    from phimlx.terminal.clipboard import paste_files

    chat.attach(paste_files(chat.limits))
    if text:
        chat.say(text)


def record(chat: Chat, text: str) -> None:
    """Let the user speak, and answer that, with a text where there is one.

    Raises `PromptError` where the model does not hear, `MediaError` where nothing is recorded.
    """
    if not chat.phi.hears:
        raise no_media(chat.phi.name, sees=chat.phi.takes_media)
    if not chat.screen.interactive:
        raise PhimlxError(
            "/record needs a terminal, at which a key ends it.",
            hint="Send a file instead: /audio FILE",
        )
    from phimlx.media.limits import Limits
    from phimlx.terminal.recording import record_clip

    chat.voice.hush()  # it would be heard
    try:
        clip = record_clip(chat.output, (chat.limits or Limits()).max_seconds)
    except KeyboardInterrupt:
        chat.output.note("Dropped what was recorded.")
        return
    if clip.failure is not None:
        chat.attach([("audio", str(clip.path))])
        raise clip.failure
    sound = Attachment.read("audio", str(clip.path), chat.limits)
    chat.output.note(f"Recorded {sound.about}.")
    chat.pending = [*chat.pending, sound]
    chat.say(text)
