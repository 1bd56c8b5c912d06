"""`phimlx history`: conversations that are kept."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from phimlx.cli.conversations import ConversationId, resolve_id
from phimlx.cli.options import json_option
from phimlx.terminal.output import Output

MARKDOWN = (".md", ".markdown")
ID = ConversationId()


@click.group()
def command() -> None:
    """List, read, search, export or delete the conversations that chat and generate keep.

    They lie in one database in the user's data folder, or in PHIMLX_DATA_DIR, which their owner
    alone may read. Of pictures, sounds and videos it keeps where they are, and no copy. --private
    keeps nothing of a conversation, PHIMLX_HISTORY=false of none.

    \b
      phimlx history search invoice
      phimlx chat --continue 12
    """


@command.command("list")
@click.option("--limit", "-n", metavar="N", type=click.IntRange(min=1), help="The last N alone.")
@json_option
def list_command(limit: int | None, as_json: bool) -> None:
    """List conversations, the one that went on last first."""
    from phimlx.history.export import summary_object
    from phimlx.history.store import History

    output = Output(json=as_json)
    with History() as history:
        found = history.conversations(limit)
    output.json({"database": str(history.path), "conversations": list(map(summary_object, found))})
    if not found:
        output.text("There is no conversation yet.")
        return
    output.table(
        ["id", "conversation", "model", "messages", "last"],
        [(each.id, each.title, each.model, each.messages, when(each.updated)) for each in found],
    )


@command.command("show")
@click.argument("id", metavar="[ID]", type=ID, required=False)
@json_option
def show_command(id: int | str | None, as_json: bool) -> None:
    """Show a conversation, the last one where no ID is given."""
    from phimlx.history.export import session_object
    from phimlx.history.store import History
    from phimlx.terminal.turns import lines_of

    output = Output(json=as_json)
    with History() as history:
        kept = history.read(resolve_id(history, id))
    output.json(session_object(kept))
    about = kept.about
    output.text(f"{about.id}  {about.title}", "bold")
    output.text(f"{about.model} · {about.messages} messages · {when(about.updated)}", "dim")
    for message in kept.messages:
        output.text()
        style_name = None if message["role"] == "assistant" else "cyan"
        for line in lines_of(message):
            output.text(line, style_name)


@command.command("search")
@click.argument("words", metavar="WORD…", nargs=-1, required=True)
@click.option(
    "--limit", "-n", metavar="N", type=click.IntRange(min=1), default=20, show_default=True
)
@json_option
def search_command(words: tuple[str, ...], limit: int, as_json: bool) -> None:
    """Find messages in which every WORD occurs, in part too."""
    from phimlx.history.export import match_object
    from phimlx.history.store import History

    output = Output(json=as_json)
    with History() as history:
        found = history.search(" ".join(words), limit)
    output.json({"matches": list(map(match_object, found))})
    if not found:
        output.text("Nothing was found.")
        return
    output.table(
        ["id", "conversation", "who", "what"],
        [
            (each.conversation.id, each.conversation.title, each.role, each.excerpt)
            for each in found
        ],
    )


@command.command("export")
@click.argument("id", metavar="[ID]", type=ID, required=False)
@click.option("--format", "form", type=click.Choice(["json", "md"]), help="[default: json]")
@click.option(
    "--output",
    "-o",
    "target",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write it here.",
)
@json_option
def export_command(
    id: int | str | None, form: str | None, target: Path | None, as_json: bool
) -> None:
    """Write a conversation, the last one where no ID is given, to stdout or to a file.

    As an object of JSON, which chat --load reads, or as Markdown: --format md, or FILE.md.
    """
    from phimlx.errors import HistoryError
    from phimlx.files import translate_write_errors, write_file
    from phimlx.history.export import markdown, session_object
    from phimlx.history.store import History
    from phimlx.terminal.output import encode_json

    output = Output(json=as_json)
    with History() as history:
        kept = history.read(resolve_id(history, id))
    suffix = "" if target is None else target.suffix.lower()
    form = form or ("md" if suffix in MARKDOWN else "json")
    text = markdown(kept) if form == "md" else encode_json(session_object(kept), indent=2) + "\n"
    if target is None:
        output.json({"id": kept.place.id, "format": form, "text": text})
        output.write(text)
        return
    if target.exists():
        raise HistoryError(f"{target} exists already.", "Choose another name, or remove it.")
    with translate_write_errors(target, HistoryError):
        write_file(target, text.encode("utf-8", "replace"), private=True)
    output.json({"id": kept.place.id, "format": form, "output": str(target)})
    output.text(f"Conversation {kept.place.id} is in {target}.")


@command.command("delete")
@click.argument("ids", metavar="ID…", nargs=-1, type=ID)
@click.option("--all", "everything", is_flag=True, help="Every conversation.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
def delete_command(ids: tuple[int | str, ...], everything: bool, yes: bool, as_json: bool) -> None:
    """Delete conversations for good, after asking."""
    from phimlx.history.store import History

    if bool(ids) == everything:
        raise click.UsageError("Name conversations by their IDs, or give --all.")
    output = Output(json=as_json)
    with History() as history:
        about = {resolve_id(history, id): None for id in ids}
        titles = [history.read(id).about.title for id in about]
        count = len(history.conversations()) if everything else len(about)
        named = f"“{titles[0]}”" if len(titles) == 1 else conversations(count)
        if not yes:
            if not output.can_ask:
                raise click.UsageError(
                    "Nobody can be asked here: add --yes to delete without asking."
                )
            if not output.confirm(f"Delete {named} for good?"):
                output.note("Nothing is deleted.")
                raise click.Abort
        if everything:
            count = history.delete_all()
        else:
            history.delete(*about)
    output.json({"deleted": count, "ids": list(about)})
    output.text(f"Deleted {conversations(count)}.")


def conversations(count: int) -> str:
    """Say how many."""
    return "1 conversation" if count == 1 else f"{count:,} conversations"


def when(seconds: float) -> str:
    """Write a time as the clock here shows it."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "minutes")[:16]
