"""Values that no file should hold, as JSON writes them."""

from __future__ import annotations

import json
from typing import Any

NUMBERS = {
    "too large for a float": "1" + "0" * 400,
    "of 5,000 digits": "1" * 5000,
    "of 5,000 digits below zero": "-" + "1" * 5000,
    "1e-320": "1e-320",
    "1e300": "1e300",
    "1e400": "1e400",
    "infinity": "Infinity",
    "minus infinity": "-Infinity",
    "not a number": "NaN",
    "zero": "0",
    "minus zero": "-0.0",
    "one": "1",
    "minus one": "-1",
    "a half": "0.5",
    "ten million": "10000000",
    "2^31": str(2**31),
    "2^32": str(2**32),
    "2^63": str(2**63),
    "2^64 below zero": str(-(2**64)),
}
OTHERS = {
    "true": "true",
    "null": "null",
    "digits as text": '"12"',
    "words": '"x"',
    "empty text": '""',
    "NUL": '"a\\u0000b"',
    "half a surrogate": '"\\ud800"',
    "escapes": '"\\u001b]52;c;QQ==\\u0007"',
    "a way out": '"../../x"',
    "a megabyte": json.dumps("x" * 1_000_000),
    "a list": "[1, 2]",
    "an empty list": "[]",
    "a table": '{"a": 1}',
    "an empty table": "{}",
    "a list of lists": "[" * 900 + "]" * 900,
    "nested 100,000 deep": "[" * 100_000 + "]" * 100_000,
    "tables 100,000 deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "100,000 numbers": "[" + ",".join(["1"] * 100_000) + "]",
    "100,000 names": json.dumps({f"n{i}": i for i in range(100_000)}),
}
VALUES = {**NUMBERS, **OTHERS}

_HOLE = "@@@"


def put(table: Any, path: tuple[Any, ...], value: str) -> str:
    """Write JSON with a value, as written, at a path of keys and numbers."""
    copy = json.loads(json.dumps(table))
    place = copy
    for key in path[:-1]:
        place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
    place[path[-1]] = _HOLE
    return json.dumps(copy).replace(json.dumps(_HOLE), value)


def twice(table: dict[str, Any], key: str, value: str) -> str:
    """Write JSON with a key that comes twice."""
    return f"{json.dumps(table)[:-1]}, {json.dumps(key)}: {value}}}"
