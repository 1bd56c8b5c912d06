"""A model folder's `generation_config.json`, read as it is meant, whichever tool wrote it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phimlx.errors import ConfigError, PhimlxError, shortened
from phimlx.files import parse_json_object, read_bytes
from phimlx.generation.sampler import RANGES

NAME = "generation_config.json"
LARGEST = 1_000_000  # bytes
MOST_STOP_TOKENS = 1000

# A text of JSON, ended or not, or a comma before the end of a list or table.
_TRAILING_COMMA = re.compile(rb'("(?:[^"\\]|\\.)*+"?)|,(?=\s*[}\]])')


@dataclass(frozen=True)
class GenerationConfig:
    """What a model's own file says of how its replies are made.

    Attributes:
        values: `do_sample`, `eos_token_id` as a list, and settings of `Sampling`, each in range.
        remarks: a sentence for each thing that could not be understood and is left out.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> GenerationConfig:
        """Read the file of a model folder; it is empty where there is none.

        Nothing in it keeps a model from being loaded.
        """
        path = folder / NAME
        try:
            data = read_bytes(path, limit=LARGEST) if os.path.lexists(path) else b""
            text = data.removeprefix(b"\xef\xbb\xbf").strip()
            text = _TRAILING_COMMA.sub(lambda found: found[1] or b"", text)
            return cls.of(parse_json_object(text, path) if text else {})
        except PhimlxError as error:
            return cls(remarks=(f"{str(error).rstrip('.')}: its settings are left out.",))

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> GenerationConfig:
        """Understand settings as they are written."""
        values, remarks = {}, []
        for key, understand in _UNDERSTAND.items():
            value = written.get(key)
            if value is None:
                continue
            try:
                values[key] = understand(value)
            except ConfigError as error:
                remarks.append(f"{NAME}: {key} is {shortened(value)}, not {error}; it is left out.")
        if values.get("top_p") == 0:  # of any share at least the likeliest token is kept
            values |= {"top_p": 1.0, "top_k": 1}
        return cls(values, tuple(remarks))


def _number(value: Any) -> float:
    """Take a number, also where it is written as text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ConfigError("a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError("a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise ConfigError("a number")
    return value


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ConfigError("a whole number")
    return int(number)


def _top_k(value: Any) -> int:
    number = _whole(value)
    if number < -1:
        raise ConfigError("a whole number, 0 or -1 for no limit")
    return max(number, 0)  # -1 is vLLM's for no limit


def _top_p(value: Any) -> float:
    number = _number(value)
    if not 0 <= number <= 1:
        raise ConfigError("from 0 to 1")
    return number


def _in_range(name: str) -> Callable[[Any], float]:
    allows, what = RANGES[name]

    def check(value: Any) -> float:
        number = _number(value)
        if not allows(number):
            raise ConfigError(what)
        return number

    return check


def _flag(value: Any) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False}
    flag = known.get(str(value).lower()) if isinstance(value, bool | int | str) else None
    if flag is None:
        raise ConfigError("true or false")
    return flag


def _tokens(value: Any) -> list[int]:
    listed = value if isinstance(value, list) else [value]
    if len(listed) > MOST_STOP_TOKENS:
        raise ConfigError("a token or a list of some")
    tokens = [_whole(token) for token in listed if token is not None]
    return [token for token in tokens if token >= 0]  # -1 is transformers' for none


_UNDERSTAND: dict[str, Callable[[Any], Any]] = {
    "do_sample": _flag,
    "eos_token_id": _tokens,
    **{name: _in_range(name) for name in RANGES},
    "top_k": _top_k,
    "top_p": _top_p,
}
