"""Times as people write them: seconds, "5m", "1h30m", -1 for ever."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from typing import Any

UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
LONGEST = 100  # letters of a time
FOREVER = 1e12  # seconds, and more
_PIECE = r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)"
_DURATION = re.compile(rf"[-+]?(?:0|(?:{_PIECE})+)")


def read_duration(value: Any) -> float:
    """Read a number of seconds, or a text such as "5m" or "1h30m"; negative is for ever.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, str):
        if len(value) > LONGEST or not _DURATION.fullmatch(value):
            raise ValueError('it must be a number of seconds, or a text such as "5m"')
        seconds = sum(float(count) * UNITS[unit] for count, unit in re.findall(_PIECE, value))
        value = -seconds if value.startswith("-") else seconds
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and math.isnan(value)):
        raise ValueError('it must be a number of seconds, or a text such as "5m"')
    return math.inf if value < 0 or value > FOREVER else float(value)


def read_seconds(value: Any) -> float:
    """Read what `read_duration` does, and a text that is a number of seconds."""
    with suppress(TypeError, ValueError):
        value = float(value)
    return read_duration(value)
