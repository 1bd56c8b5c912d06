"""The start of every run of the command line: a clean import path, then the command table.

Imports nothing but what the interpreter has loaded, so that nothing can be shadowed before.
"""

from __future__ import annotations

import os
import sys

from phimlx.cli import EXIT_INTERRUPTED


def main() -> None:
    """Run the command line; the process ends with 0 done, 1 failed, 2 usage or 130 interrupted."""
    try:
        leave_working_directory()
        import warnings

        if not sys.warnoptions and "--debug" not in sys.argv:
            warnings.simplefilter("ignore")  # they are for those who write programs

        from phimlx.terminal.sink import guard_streams

        guard_streams()
        from phimlx.cli.group import cli

        cli(prog_name="phimlx")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except (ImportError, OSError, MemoryError) as error:  # before there is a command
        from phimlx.errors import system_error
        from phimlx.terminal.output import Output

        if system_error(error) is None:
            raise
        Output(json="--json" in sys.argv).failure(error)
        sys.exit(1)


def leave_working_directory() -> None:
    """Take the working directory off `sys.path`: a `convert.py` in it must not become ours.

    It stays where phimlx itself was found there, for then the modules in it are ours.
    """
    try:
        here = os.getcwd()
    except OSError:  # it is gone, and holds nothing that could be imported
        return
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if here != home and not here.endswith(("site-packages", "dist-packages")):
        sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]
