"""What `chat` and `generate` share to keep conversations, and to go on with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from phimlx.cli.preferences import preferences
from phimlx.errors import shortened
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.history.records import Kept
    from phimlx.history.store import History
    from phimlx.terminal.keeper import Keeper

LAST = "last"

private_option = click.option(
    "--private", is_flag=True, help="Keep nothing of this conversation in the history."
)


class ConversationId(click.ParamType[int | str]):
    """The number of a conversation in the history, or "last"."""

    name = "conversation"

    def convert(
        self, value: int | str, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        text = str(value)
        if text == LAST:
            return LAST
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            self.fail(f"{shortened(text)} is not the number of a conversation.", param, ctx)
        return int(text)


def resolve_id(history: History, id: int | str | None) -> int:
    """Return the number of a conversation; that of the last one for "last" and None.

    Raises `HistoryError` where there is no conversation yet.
    """
    return id if isinstance(id, int) else history.last()


def read_kept(id: int | str, keeper: Keeper | None) -> Kept:
    """Read a conversation to go on with, kept further or not; raises `HistoryError`."""
    if keeper is not None:
        return keeper.history.read(resolve_id(keeper.history, id))
    from phimlx.history.store import History

    with History() as history:
        return history.read(resolve_id(history, id))


def open_keeper(private: bool, output: Output) -> Keeper | None:
    """Open what keeps a conversation; None where nothing is to be kept, or can be.

    Raises `SettingsError` for settings that do not hold.
    """
    if private or preferences().get("history") is False:
        return None
    from phimlx.errors import HistoryError
    from phimlx.history.store import History
    from phimlx.terminal.keeper import Keeper

    try:
        return Keeper(History(), output)
    except HistoryError as error:
        output.warning(f"this conversation is not kept. {error}")
        return None


def model_name(model: str | None) -> str:
    """Name a model for a conversation that is kept so that it is found from another folder."""
    model = model or preferences().get("model")
    if model is None:
        from phimlx import catalog

        return catalog.DEFAULT.alias
    return lasting_name(model, "config.json")


def lasting_name(name: str, file: str = "") -> str:
    """Return a folder, told by a file in it, as a whole path; any other name as it is."""
    folder = Path(name)
    return str(folder.resolve()) if (folder / file).exists() else name
