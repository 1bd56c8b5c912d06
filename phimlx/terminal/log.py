"""The log of a program that runs on its own, as notes on stderr."""

from __future__ import annotations

import logging
import time

from phimlx.terminal.output import Output


class LogHandler(logging.Handler):
    """Writes records as lines, each with its time."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.INFO)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        self._output.note(f"{moment} {self.format(record)}", style_name=None)


def show_log(output: Output, *names: str) -> None:
    """Write what loggers say, from warnings on where they are not ours."""
    for name in names:
        logger = logging.getLogger(name)
        logger.addHandler(LogHandler(output))
        logger.setLevel(logging.INFO if name.startswith("phimlx") else logging.WARNING)
        logger.propagate = False
