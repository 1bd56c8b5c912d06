"""`phimlx history`: conversations that are kept."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from phimlx.cli.conversations import ConversationId, resolve_id
from phimlx.cli.options import json_option
from phimlx.sizes import counted
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
@click.argument("ids", metavar="[ID…]", type=ID, nargs=-1)
@click.option("--format", "form", type=click.Choice(["json", "md"]), help="[default: json]")
@click.option(
    "--output",
    "-o",
    "target",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write it here.",
)
@click.option(
    "--train",
    is_flag=True,
    help="Write rows that phimlx train takes, after asking about each conversation.",
)
@click.option("--yes", "-y", is_flag=True, help="With --train and IDs: do not ask about these.")
@json_option
def export_command(
    ids: tuple[int | str, ...],
    form: str | None,
    target: Path | None,
    train: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Write a conversation, the last one where no ID is given, to stdout or to a file.

    As an object of JSON, which chat --load reads, or as Markdown: --format md, or FILE.md.

    With --train it is a line of JSON for each conversation, of those named or else of all, and
    only of those that you agree to, one by one.

    \b
      phimlx history export --train -o chats.jsonl
    """
    from phimlx.history.export import markdown, session_object
    from phimlx.history.store import History
    from phimlx.terminal.output import encode_json

    output = Output(json=as_json)
    if train:
        if form is not None:
            raise click.UsageError("--format does not go with --train.")
        _export_rows(ids, target, yes, output)
        return
    if yes or len(ids) > 1:
        raise click.UsageError("--yes and several IDs go with --train.")
    with History() as history:
        kept = history.read(resolve_id(history, ids[0] if ids else None))
    suffix = "" if target is None else target.suffix.lower()
    form = form or ("md" if suffix in MARKDOWN else "json")
    text = markdown(kept) if form == "md" else encode_json(session_object(kept), indent=2) + "\n"
    if target is None:
        output.json({"id": kept.place.id, "format": form, "text": text})
        output.write(text)
        return
    _write(target, text)
    output.json({"id": kept.place.id, "format": form, "output": str(target)})
    output.text(f"Conversation {kept.place.id} is in {target}.")


def _export_rows(
    ids: tuple[int | str, ...], target: Path | None, yes: bool, output: Output
) -> None:
    """Write rows of training data, of the conversations that somebody agrees to."""
    from phimlx.errors import HistoryError
    from phimlx.history.export import training_row
    from phimlx.history.store import History
    from phimlx.terminal.output import encode_json

    if yes and not ids:
        raise click.UsageError("--yes goes with IDs: each conversation is agreed to by its own.")
    if not yes and not output.can_ask:
        raise click.UsageError(
            "Nobody can be asked here: name conversations by their IDs, and add --yes."
        )
    if target is not None:
        _refuse_existing(target)
    lines: list[str] = []
    written: list[int] = []
    left_out: dict[int, str] = {}
    with History() as history:
        chosen = dict.fromkeys(resolve_id(history, id) for id in ids)
        for id in chosen or [each.id for each in history.conversations()]:
            kept = history.read(id)
            about = kept.about
            try:
                row = training_row(kept)
            except HistoryError as error:
                left_out[id] = str(error)
                output.note(f"Conversation {id}, “{about.title}”, is left out: {error}.")
                continue
            told = f"{about.id}  “{about.title}” ({about.model}, {about.messages} messages, "
            if not yes and not output.confirm(f"Learn from {told}{when(about.updated)})?"):
                left_out[id] = "not agreed to"
                continue
            lines.append(encode_json(row) + "\n")
            written.append(id)
    if not lines:
        raise HistoryError(
            "No conversation is written.", "phimlx history list shows what there is."
        )
    if target is None:
        output.json({"ids": written, "left_out": left_out, "text": "".join(lines)})
        output.write("".join(lines))
        return
    _write(target, "".join(lines))
    output.json({"ids": written, "left_out": left_out, "output": str(target)})
    output.text(f"{conversations(len(written))} for training: {target}")
    output.note(f"Look at them: phimlx train --data {target} --check")


def _refuse_existing(target: Path) -> None:
    from phimlx.errors import HistoryError

    if target.exists():
        raise HistoryError(f"{target} exists already.", "Choose another name, or remove it.")


def _write(target: Path, text: str) -> None:
    """Write a new file that its owner alone may read."""
    from phimlx.errors import HistoryError
    from phimlx.files import translate_write_errors, write_file

    _refuse_existing(target)
    with translate_write_errors(target, HistoryError):
        write_file(target, text.encode("utf-8", "replace"), private=True)


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
    return counted(count, "conversation")


def when(seconds: float) -> str:
    """Write a time as the clock here shows it."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "minutes")[:16]
