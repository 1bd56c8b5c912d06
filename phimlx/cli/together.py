"""Commands that several machines run as one: the first talks, the others compute with it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import click

from phimlx.errors import MachineLostError, PhimlxError
from phimlx.launched import is_launched
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.machine.processes import ProcessGroup
    from phimlx.shared_model import Machines

MOMENT = 5.0  # seconds
MACHINES = "phimlx.machines"
"""Under which the context of a run has the machines."""


def together(command: Callable[..., None]) -> Callable[..., None]:
    """Let `mlx.launch` run a command on machines that share its model."""

    @wraps(command)
    def run(**settings: Any) -> None:
        if not is_launched():
            command(**settings)
            return

        from phimlx.machine.processes import AGAIN, ProcessGroup
        from phimlx.shared_model import Machines, follow

        processes = ProcessGroup.join(AGAIN)
        if processes.size == 1:
            command(**settings)
            return
        output = Output(json="--json" in sys.argv)
        with processes.watched(partial(end_at_once, output)):
            if not processes.is_main:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first one says what it means
                follow(processes)
                return
            machines = Machines(processes)
            signal.signal(signal.SIGTERM, partial(_end, machines))
            click.get_current_context().meta[MACHINES] = machines
            try:
                try:
                    command(**settings)
                finally:
                    machines.end()
            except MachineLostError:
                # `mlx.launch` ends those that are left; first they say why.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                raise

    return run


def _end(machines: Machines, number: int, frame: object) -> None:
    """End the run as a signal asks, and let the others go on the way.

    Raises:
        MachineLostError: where they have been lost, for which `mlx.launch` asks it.
    """
    if machines.lost is not None:
        raise machines.lost
    raise SystemExit(128 + number)


def machines() -> Machines | None:
    """The machines that share the model of this run; None where it has one of its own."""
    context = click.get_current_context(silent=True)
    found: Machines | None = None if context is None else context.meta.get(MACHINES)
    return found


@contextmanager
def first_says(processes: ProcessGroup) -> Iterator[None]:
    """Let the first machine say what stops all of them alike, as a wrong setting does.

    The others wait a moment: `mlx.launch` ends them when the first has ended.
    """
    from phimlx.errors import MachineLostError

    try:
        yield
    except PhimlxError as error:
        if not (processes.is_main or isinstance(error, MachineLostError)):
            time.sleep(MOMENT)
        raise


def end_at_once(output: Output, error: PhimlxError) -> None:
    """End a process that waits, in a thread of it, where nothing is left to be written."""
    output.error(error)
    os._exit(error.exit_code)
