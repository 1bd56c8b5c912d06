"""Slash commands of a chat, in a table."""

from __future__ import annotations

import difflib
import glob
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phimlx import catalog
from phimlx.errors import PhimlxError
from phimlx.preferences.personas import list_personas, read_persona
from phimlx.preferences.sampling import SETTINGS, Setting, find_setting, parse_setting
from phimlx.prompt.tools import load_tools
from phimlx.sizes import counted
from phimlx.terminal.answer_commands import copy, last_answer, last_code, save_code
from phimlx.terminal.chat import Chat
from phimlx.terminal.compact import compact
from phimlx.terminal.media_commands import attach, paste, record
from phimlx.terminal.reply import reply_summary
from phimlx.terminal.sink import one_line
from phimlx.terminal.turns import show_turns

LISTED = 10  # conversations at once
CODE = "code"
ON, OFF = "on", "off"
DEFAULT = "default"


@dataclass(frozen=True)
class ChatCommand:
    """One command: what it does with its argument, what that is, a line of help."""

    action: Callable[[Chat, str], None]
    argument: str
    help: str
    completes: str = ""  # "files", "settings" or one of `NAMES`

    def run(self, chat: Chat, argument: str) -> None:
        """Run it; raises `PhimlxError` for an argument that it does not take."""
        if argument and not self.argument:
            raise PhimlxError(f"This command takes nothing after its name, but got {argument!r}.")
        self.action(chat, argument)


def find_command(name: str) -> ChatCommand:
    """Return the command called `name`; raises `PhimlxError` that suggests the nearest."""
    command = COMMANDS.get(SYNONYMS.get(name.lower(), name.lower()))
    if command is None:
        nearest = difflib.get_close_matches(name.lower(), COMMANDS, n=1)
        advice = f"Did you mean /{nearest[0]}?" if nearest else "/help lists the commands."
        raise PhimlxError(
            f"There is no command /{name}.",
            f"{advice} A line that begins with // is sent as it is.",
        )
    return command


def run_command(chat: Chat, name: str, argument: str) -> None:
    """Run the command called `name`; raises `PhimlxError` as `find_command` and the command do."""
    find_command(name).run(chat, argument)


def candidates(line: str) -> list[str]:
    """Complete the last word of a line that begins a command."""
    name, space, rest = line.partition(" ")
    if not name.startswith("/"):
        return []
    if not space:
        return [f"/{command}" for command in COMMANDS if command.startswith(name[1:])]
    command = COMMANDS.get(name[1:])
    if command is None or " " in rest:
        return []
    if command.completes == "settings":
        return [setting.name for setting in SETTINGS if setting.name.startswith(rest)]
    if command.completes in NAMES:
        return [name for name in NAMES[command.completes]() if name.startswith(rest)]
    if command.completes == "files":
        start = os.path.expanduser(rest)
        return [
            rest + path[len(start) :] + ("/" if os.path.isdir(path) else "")
            for path in sorted(glob.glob(glob.escape(start) + "*"))
        ]
    return []


def _aliases() -> list[str]:
    from phimlx.preferences.file import read_preferences

    try:
        own = list(read_preferences().alias)
    except PhimlxError:  # which commands tell, and keys do not
        own = []
    return [*own, *(model.alias for model in catalog.FAMILY)]


def _personas() -> list[str]:
    try:
        return list_personas()
    except PhimlxError:
        return []


NAMES: dict[str, Callable[[], list[str]]] = {
    "models": _aliases,
    "personas": _personas,
}
"""What completes a word besides files and settings."""


def _help(chat: Chat, argument: str) -> None:
    names = {f"/{name} {command.argument}": command.help for name, command in COMMANDS.items()}
    room = chat.output.width
    lines = columns(names, room)
    lines += [
        "",
        "Enter sends, Alt-Enter begins a new line, Ctrl-X Ctrl-E opens $EDITOR.",
        "Ctrl-C stops a reply, Ctrl-D leaves.",
        "A picture, sound or video dropped here goes with your next message.",
    ]
    _say(chat, "\n".join(line for text in lines for line in wrapped(text, room)))


def columns(rows: Mapping[str, str], room: int | None) -> list[str]:
    """Write what is said of names beside them, or below where that takes more than the room."""
    width = max(map(len, rows))
    beside = [f"{name:{width}}  {text}" for name, text in rows.items()]
    if room is None or max(map(len, beside)) <= room:
        return beside
    return [line for name, text in rows.items() for line in (name, f"    {text}")]


def wrapped(text: str, room: int | None) -> list[str]:
    """Break a line at words to fit the room, what follows indented as it is."""
    if room is None or len(text) <= room:
        return [text]
    indent = " " * (len(text) - len(text.lstrip()))
    return textwrap.wrap(text, room, subsequent_indent=indent)


def _system(chat: Chat, argument: str) -> None:
    if not argument:
        _say(chat, chat.conversation.system or "There is no system prompt.")
        return
    chat.conversation.system = None if argument == OFF else argument
    _done(chat, "No system prompt from here on." if argument == OFF else "System prompt set.")


def _clear(chat: Chat, argument: str) -> None:
    chat.conversation.clear()
    chat.pending = []
    _done(chat, "Forgot what was said; system prompt, settings and tools stay.")


def _undo(chat: Chat, argument: str) -> None:
    text = chat.conversation.undo()
    first, _, more = text.partition("\n")
    _done(chat, f"Took back: {first}{' …' if more else ''}")


def _retry(chat: Chat, argument: str) -> None:
    chat.answer(chat.conversation.retry())


def _save(chat: Chat, argument: str) -> None:
    path = _path(argument) if argument else chat.saved_as
    if path is None:
        raise PhimlxError("Where to? Nothing was saved or loaded before.", "Say /save FILE.")
    chat.conversation.save(path, replace=path == chat.saved_as)
    chat.saved_as = path
    _done(chat, f"Saved to {path}.")


def _load(chat: Chat, argument: str) -> None:
    if not argument:
        raise PhimlxError("Which one?", "Say /load FILE, or /load ID of those that /history lists.")
    path = _path(argument)
    if argument.isascii() and argument.isdigit() and not path.exists():
        chat.resume_kept(int(argument[:19]))
    else:
        chat.resume(path)


def _history(chat: Chat, argument: str) -> None:
    if argument:
        found = chat.history.search(argument, LISTED)
        rows = [(each.conversation.id, f"{each.role}: {each.excerpt}") for each in found]
    else:
        rows = [(each.id, each.title) for each in chat.history.conversations(LISTED)]
    if not rows:
        _say(chat, "Nothing was found." if argument else "There is no conversation yet.")
        return
    width = len(str(max(id for id, _ in rows)))
    lines = [f"{id:{width}}  {one_line(text)}" for id, text in rows]
    _say(chat, "\n".join([*lines, "Go on with one: /load ID"]))


def _set(chat: Chat, argument: str) -> None:
    name, _, text = argument.partition(" ")
    settings = chat.conversation.settings
    if not name:
        width = max(len(setting.name) for setting in SETTINGS)
        _say(chat, "\n".join(f"{item.name:{width}}  {_value(chat, item)}" for item in SETTINGS))
        return
    setting, text = find_setting(name), text.strip()
    if text == DEFAULT:
        settings.pop(setting.keyword, None)
    elif text:
        value = parse_setting(setting, text)
        before = settings.get(setting.keyword, ()) if setting.multiple else None
        settings[setting.keyword] = value if before is None else (*before, *value)
    _say(chat, f"{setting.name}  {_value(chat, setting)}")


def _value(chat: Chat, setting: Setting) -> str:
    value = chat.conversation.settings.get(setting.keyword)
    if value is not None:
        return ", ".join(map(repr, value)) if setting.multiple else str(value)
    default: Any = getattr(chat.phi.sampling, setting.keyword, None)
    return "not set" if default is None else f"{default} (the model's default)"


def _stats(chat: Chat, argument: str) -> None:
    reply = chat.last_reply
    if reply is None and not chat.conversation.messages:
        _say(chat, "There was no reply yet.")
        return
    used, room = chat.context_used(), chat.phi.context_length
    lines = [reply_summary(reply)] if reply is not None and chat.is_last(reply) else []
    _say(chat, "\n".join([*lines, f"{used:,} of {room:,} tokens of context, {used / room:.1%}"]))


def _compact(chat: Chat, argument: str) -> None:
    count = compact(chat)
    _done(
        chat,
        f"That stands for the {count} oldest messages now." if count else "All stays as it was.",
    )


def _model(chat: Chat, argument: str) -> None:
    if argument:
        chat.use_model(argument)
    adapter = chat.conversation.adapter
    _say(chat, chat.conversation.model + (f" with {adapter}" if adapter else ""))


def _persona(chat: Chat, argument: str) -> None:
    names = list_personas()
    if not argument:
        _say(chat, f"Personas: {', '.join(names)}." if names else "There is no persona yet.")
        return
    persona = read_persona(argument)
    conversation = chat.conversation
    model, adapter = persona.get("model"), persona.get("adapter")
    if (model or adapter) and (model, adapter) != (conversation.model, conversation.adapter):
        chat.use_model(model or conversation.model, adapter)
    conversation.wear(persona)
    chat.connect(persona.mcp)
    _done(chat, f"{persona.name} goes on.")


def _copy(chat: Chat, argument: str) -> None:
    if argument not in ("", CODE):
        raise PhimlxError("What is to be copied?", "Say /copy, or /copy code.")
    text = last_code(chat.conversation) if argument else last_answer(chat.conversation)
    copy(text, chat.output)
    _done(chat, f"Copied {counted(len(text), 'character')}.")


def _code(chat: Chat, argument: str) -> None:
    if not argument:
        raise PhimlxError("Where to?", "Say /code FILE.")
    save_code(chat.conversation, _path(argument))
    _done(chat, f"Saved to {_path(argument)}.")


def _edit(chat: Chat, argument: str) -> None:
    text = argument or chat.screen.edit(chat.conversation.last_said())
    if text is None:
        raise PhimlxError("Nothing is changed.", "Say /edit TEXT, or change the line and send it.")
    chat.answer(chat.conversation.edit(text))


def _show(chat: Chat, argument: str) -> None:
    conversation = chat.conversation
    messages = [*conversation.messages, *conversation.unanswered]
    if not messages:
        _say(chat, "Nothing has been said yet.")
        return
    show_turns(messages, chat.output)
    _done(chat, f"{counted(len(messages), 'message')}.")


def _tools(chat: Chat, argument: str) -> None:
    conversation, box = chat.conversation, chat.toolbox
    if argument in (OFF, ON):
        box.offers = argument == ON
    if argument == OFF:
        conversation.tools = None
    elif argument and argument != ON:
        conversation.tools = load_tools(_path(argument))
    names = [tool["name"] for tool in conversation.tools or ()]
    lines = [f"The model may call {', '.join(names)}."] if names else []
    _say(chat, "\n".join([*lines, *box.lines()] or ["There are no tools."]))


def _speak(chat: Chat, argument: str) -> None:
    if argument not in ("", ON, OFF):
        raise PhimlxError("Shall answers be read aloud?", "Say /speak on, or /speak off.")
    if argument:
        chat.voice.turn(on=argument == ON)
    name = chat.voice.name
    _say(chat, f"Answers are read aloud by {name}." if name else "No voice.")


def _drop(chat: Chat, argument: str) -> None:
    if argument:
        if not (argument.isascii() and argument.isdigit() and len(argument) < 10):
            raise PhimlxError("How many turns?", "Say /drop N, with a whole number.")
        chat.conversation.drop_oldest(int(argument))
        _done(chat, f"Forgot the oldest {'turn' if argument == '1' else f'{argument} turns'}.")
        return
    if not chat.pending:
        raise PhimlxError("There is nothing to drop.")
    chat.pending = []
    _done(chat, "Nothing goes with your next message.")


def _exit(chat: Chat, argument: str) -> None:
    chat.left = True


COMMANDS = {
    "help": ChatCommand(_help, "", "list the commands"),
    "system": ChatCommand(_system, "[TEXT|off]", "show, set or remove the system prompt"),
    "clear": ChatCommand(_clear, "", "forget what was said"),
    "undo": ChatCommand(_undo, "", "take back your last message and its answer"),
    "retry": ChatCommand(_retry, "", "answer the last message again"),
    "image": ChatCommand(attach("image"), "FILE [TEXT]", "show a picture", "files"),
    "audio": ChatCommand(attach("audio"), "FILE [TEXT]", "play a sound", "files"),
    "video": ChatCommand(attach("video"), "FILE [TEXT]", "show pictures of a video", "files"),
    "paste": ChatCommand(paste, "[TEXT]", "show a screenshot, or files, from the clipboard"),
    "record": ChatCommand(record, "[TEXT]", "speak instead of typing; Enter or silence ends it"),
    "speak": ChatCommand(_speak, "[on|off]", "read answers aloud; Ctrl-C stops the voice"),
    "drop": ChatCommand(_drop, "[N]", "send no file after all, or forget the N oldest turns"),
    "compact": ChatCommand(_compact, "", "let the model sum up the oldest turns"),
    "edit": ChatCommand(_edit, "[TEXT]", "change your last message and ask again"),
    "show": ChatCommand(_show, "", "show the whole conversation"),
    "copy": ChatCommand(_copy, "[code]", "copy the last answer, or its last block of code"),
    "code": ChatCommand(_code, "FILE", "save the last block of code", "files"),
    "save": ChatCommand(_save, "[FILE]", "save the conversation", "files"),
    "load": ChatCommand(_load, "FILE|ID", "go on with a saved or kept conversation", "files"),
    "history": ChatCommand(_history, "[WORDS]", "list conversations, or find words in them"),
    "set": ChatCommand(_set, "[NAME [VALUE|default]]", "show or change settings", "settings"),
    "stats": ChatCommand(_stats, "", "tokens and speed of the last reply, context used"),
    "model": ChatCommand(_model, "[NAME]", "show the model, or go on with another", "models"),
    "persona": ChatCommand(_persona, "[NAME]", "list personas, or go on as one", "personas"),
    "tools": ChatCommand(_tools, "[FILE|off|on]", "show, load or drop tools to call", "files"),
    "exit": ChatCommand(_exit, "", "leave"),
}

SYNONYMS = {"?": "help", **dict.fromkeys(("bye", "quit", "q"), "exit")}
"""What other programs call a command -> its name here."""


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _say(chat: Chat, text: str) -> None:
    for line in text.split("\n"):
        chat.output.note(line, style_name=None)


def _done(chat: Chat, text: str) -> None:
    chat.output.note(text)
