"""What several commands share: options, each declared once, and loading the model they name.

Knows names, bounds and help; what a command does with a value is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from phimlx.terminal.output import Output
from phimlx.terminal.settings import SETTINGS, Setting

if TYPE_CHECKING:
    from phimlx.api import Phi

DEBUG = "phimlx.debug"
"""Set in the context's `meta` by --debug."""

AnyCallable = TypeVar("AnyCallable", bound=Callable[..., Any])

model_option = click.option(
    "--model",
    metavar="MODEL",
    help="An alias, a Hub id or a folder  [default: phi-4-mini at 4 bits]",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON object."
)
system_option = click.option(
    "--system", "--system-prompt", "system", metavar="TEXT", help="What the model is told first."
)
tools_option = click.option(
    "--tools",
    "tools_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Functions that the model may call: a JSON list of their definitions.",
)


def _option(setting: Setting) -> Callable[[AnyCallable], AnyCallable]:
    names = [setting.flag, *([setting.short] if setting.short else []), setting.keyword]
    return click.option(
        *names,
        type=setting.type,
        metavar=setting.metavar,
        multiple=setting.multiple,
        help=setting.help,
    )


def sampling_options(command: AnyCallable) -> AnyCallable:
    """Add the flags of `phimlx.terminal.settings`; the command takes them as keywords.

    A setting that was not given arrives as None, or () where it may be given again:
    `phimlx.terminal.settings.given` leaves those out.
    """
    for setting in reversed(SETTINGS):
        command = _option(setting)(command)
    return command


def is_debugging() -> bool:
    """Whether the run was asked for tracebacks."""
    return DEBUG in click.get_current_context().meta


def load_model(model: str | None, output: Output) -> Phi:
    """Load the model that `--model` names; the catalogue's default where it was not given.

    Where it is not here and somebody sits at the terminal, it is downloaded, above 1 GB after
    asking. Elsewhere that is an error, which names the command.
    """
    from phimlx import api
    from phimlx.errors import ModelAbsentError

    loading = f"Loading {model or 'the model'}…"
    try:
        with output.status(loading):
            return api.load(model)
    except ModelAbsentError as absent:
        from phimlx.cli.bars import bring

        bring(model, output, absent)
    with output.status(loading):
        return api.load(model)
