"""Renders templates that nobody has vouched for: the worker process's side of `isolated`."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

from phimlx.errors import PromptError
from phimlx.prompt.sandbox.environment import Template, explain
from phimlx.prompt.sandbox.protocol import (
    HINT,
    LENGTH,
    MAX_MEMORY,
    MAX_SECONDS,
    MAX_TEXT,
    TOO_MUCH,
    decode,
    encode,
)

SOCKET = 0  # the file descriptor that the parent talks through
LIMITS = {resource.RLIMIT_AS: MAX_MEMORY, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}

_template = lru_cache(maxsize=8)(Template)


def main() -> None:
    """Answer requests until the parent closes the socket."""
    for kind, limit in LIMITS.items():
        with suppress(ValueError, OSError):  # macOS has no limit of memory: the parent looks
            resource.setrlimit(kind, (limit, limit))
    _send(encode({}))
    while request := _receive():
        _limit_time()
        try:
            answer = encode(_answer(decode(request)))
        except Exception as error:
            fault = explain(error)
            answer = encode({"error": str(fault), "hint": fault.hint})
        _send(answer)


def _limit_time() -> None:
    """End this process where it computes for longer than its parent, which may be gone, waits."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    seconds = int(time.process_time() + MAX_SECONDS) + 1
    with suppress(ValueError):  # the user's own limit is lower
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    template = _template(request["source"])
    if "variables" not in request:
        return {"variables": [*template.variables], "keys": [*template.keys]}
    text = template.render(request["variables"])
    if len(text) > MAX_TEXT:
        raise PromptError(TOO_MUCH, hint=HINT)
    return {"text": text}


def _send(frame: bytes) -> None:
    rest = memoryview(frame)
    while rest:
        rest = rest[os.write(SOCKET, rest) :]


def _receive() -> bytes:
    """The next request; empty where the parent is gone."""
    header = _read(LENGTH.size)
    return _read(LENGTH.unpack(header)[0]) if len(header) == LENGTH.size else b""


def _read(size: int) -> bytes:
    found = bytearray()
    while len(found) < size and (piece := os.read(SOCKET, min(size - len(found), 2**20))):
        found += piece
    return bytes(found)
