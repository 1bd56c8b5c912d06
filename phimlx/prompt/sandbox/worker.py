"""Renders templates that nobody has vouched for: the worker process's side of `isolated`."""

from __future__ import annotations

import gc
import os
import resource
import signal
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
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a parent may have it ignored
    _send(encode({}))
    while request := _receive():
        # The parent, which waits for less, may be gone: nobody else would end a busy worker then.
        signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS + 1)
        answer = _reply(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(answer)


def _reply(request: bytes) -> bytes:
    """The frame that answers one."""
    try:
        return encode(_answer(decode(request)))
    except Exception as error:
        fault = explain(error)
        told = {"error": str(fault), "hint": fault.hint}
        del fault
    gc.collect()  # its frames held what was rendered, and each other
    return encode(told)


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    template = _template(request["source"])
    if "variables" not in request:
        return {"variables": [*template.variables], "keys": [*template.keys]}
    if "turns" in request:
        parts = template.render_turns(request["variables"])
        return {"parts": parts if parts is None else _within_limit(parts)}
    return {"text": _within_limit([template.render(request["variables"])])[0]}


def _within_limit(texts: list[str]) -> list[str]:
    """The same texts; raises PromptError where they are too long together."""
    if sum(map(len, texts)) > MAX_TEXT:
        raise PromptError(TOO_MUCH, hint=HINT)
    return texts


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
