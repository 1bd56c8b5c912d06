"""Flags that say which server may answer in place of a model that is loaded here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx import catalog
from phimlx.cli.options import AnyCallable
from phimlx.cli.preferences import preferences
from phimlx.errors import ModelNotFoundError, PhimlxError, PromptError, SettingsError
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.remote.phi import RemotePhi

KEY_VARIABLE = "PHIMLX_API_KEY"
LARGEST_KEY = 1 << 14  # bytes of its file

_server = click.option(
    "--server",
    metavar="URL",
    help="Let a phimlx serve answer  [default: one of yours that holds the model]",
)
_no_server = click.option(
    "--no-server", is_flag=True, help="Load the model here, whatever servers hold."
)
_key_file = click.option(
    "--server-key-file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help=f"File that holds the server's key  [default: {KEY_VARIABLE}]",
)


def server_options(command: AnyCallable) -> AnyCallable:
    """Add --server, --no-server and --server-key-file; `pop_servers` takes what they gave."""
    for option in (_key_file, _no_server, _server):
        command = option(command)
    return command


def pop_servers(values: dict[str, Any]) -> Servers:
    """Take the server out of a command's keywords.

    Raises:
        SettingsError: where the file of its key cannot be read.
    """
    url, never = values.pop("server"), values.pop("no_server")
    if url is not None and never:
        raise click.UsageError("--server and --no-server exclude each other.")
    key_file = values.pop("server_key_file")
    return Servers(url, never, None if never else _read_key(key_file))


@dataclass(frozen=True)
class Servers:
    """The servers that may answer: the one at `url`, else any that this user runs, or none."""

    url: str | None
    never: bool
    key: str | None

    def find(
        self,
        model: str | None,
        here: Mapping[str, Any],
        settings: Mapping[str, Any],
        output: Output,
        chats: bool = False,
    ) -> RemotePhi | None:
        """Find the model on a server, and say so; None where it is to be loaded here.

        Args:
            model: from --model; an alias of the user's own is resolved.
            here: flags of what can only be done with a model that is loaded here, and their values.
            settings: of sampling.
            chats: whether it is to chat, in a prompt form of its own where it has one.

        Raises:
            UsageError: where --server goes with one of them.
            PhimlxError: where the server at `url` cannot be asked, or does not have the model.
        """
        if self.never:
            return None
        beyond = [*(flag for flag, value in here.items() if value), *_beyond(settings)]
        model = preferences().choose(model).model
        if self.url is None:
            found = None if beyond else _discover(model, self.key)
            if found is None or (chats and found.chat_form):
                return None
        else:
            if beyond:
                raise click.UsageError(f"--server goes without {', '.join(beyond)}.")
            found = _connect(self.url, model, self.key)
            if chats and found.chat_form:
                raise PromptError(
                    f"{found.name} chats in a prompt form that a server does not write.",
                    hint="Leave --server out, or take a model that was trained to chat.",
                )
        output.note(f"Answered by the server at {found.url}.")
        return found


def _beyond(settings: Mapping[str, Any]) -> list[str]:
    from phimlx.preferences.sampling import find_setting
    from phimlx.remote.body import MOST

    return [
        f"{find_setting(name).flag} above {most:g}"
        for name, most in MOST.items()
        if (settings.get(name) or 0) > most
    ]


def _read_key(path: Path | None) -> str | None:
    from phimlx.files import read_text

    key = os.environ.get(KEY_VARIABLE) or None
    place = KEY_VARIABLE
    if path is not None:
        key, place = read_text(path, SettingsError, limit=LARGEST_KEY).strip(), str(path)
    if key is not None and not (key and key.isascii() and key.isprintable()):
        raise SettingsError(f"{place} holds no key.", hint="A key is one line of plain letters.")
    return key


def _discover(model: str | None, key: str | None) -> RemotePhi | None:
    from phimlx.remote.notes import find_loaded, read_notes

    if not read_notes():
        return None
    from phimlx.hub.resolve import resolve

    try:
        stamp = _stamp(resolve(model))
    except (OSError, PhimlxError):  # which loading it will tell
        return None
    return find_loaded(stamp, key)


def _connect(url: str, model: str | None, key: str | None) -> RemotePhi:
    from phimlx.remote.client import Client
    from phimlx.remote.phi import RemotePhi, loaded_models

    client = Client(url, key)
    if model is None:
        models = loaded_models(client)
        return RemotePhi.connect(
            client, models[0].name if len(models) == 1 else catalog.DEFAULT.alias
        )
    folder = Path(model).expanduser()
    if catalog.find(model) is not None or not folder.is_dir():
        return RemotePhi.connect(client, model)
    stamp = _stamp(folder)
    for about in loaded_models(client):
        if about.stamp == stamp:
            return RemotePhi(client, about)
    raise ModelNotFoundError(
        f"{model} is a folder, and the server at {client.url} does not hold what is in it.",
        hint="Give a model's name there, or load it here: --no-server.",
    )


def _stamp(folder: Path) -> str:
    from phimlx.hub.content_hash import Contents

    return Contents(folder).stamp
