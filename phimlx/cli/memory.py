"""`--ignore-memory`: what a forecast refuses becomes a warning."""

from __future__ import annotations

from collections.abc import Callable

import click

from phimlx.errors import PhimlxError
from phimlx.terminal.output import Output

ignore_memory_option = click.option(
    "--ignore-memory", is_flag=True, help="Begin even where the memory is not expected to do."
)


def check_memory(check: Callable[[], str | None], ignore_memory: bool, output: Output) -> None:
    """Show what a forecast warns of, and with --ignore-memory what it refuses.

    Args:
        check: returns a warning, or None; raises where the memory will not do.

    Raises:
        PhimlxError: what `check` raises, where that is not to be ignored.
    """
    try:
        warning = check()
    except PhimlxError as error:
        if not ignore_memory:
            raise
        warning = str(error)
    if warning is not None:
        output.warning(warning)
