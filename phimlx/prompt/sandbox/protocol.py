"""Messages between a process and its worker, and the limits that both hold.

A frame is 8 bytes of length, then JSON in UTF-8, lone surrogates allowed. A request `{"source": …}`
is answered by the names that the template reads, one with `"variables"` as well by its text, and
one with `"turns"` beside them by that in parts; `{"error": …, "hint": …}` answers each where there
is a fault.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

LENGTH = struct.Struct("=Q")

MAX_SOURCE = 65_536  # characters; the longest published chat templates have about 30,000
MAX_TEXT = 16 * 2**20  # characters; 128 for each token of the longest context
MAX_MEMORY = 256 * 2**20  # bytes of a worker
MAX_SECONDS = 3.0  # for one render, as the clock on the wall says

HINT = "Use the chat template that the model's publisher ships, or remove it for the built-in one."
TOO_MUCH = "The chat template builds far more text than a prompt can hold."


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as a frame."""
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return LENGTH.pack(len(data)) + data


def decode(data: bytes) -> dict[str, Any]:
    """The message in a frame, whose length has been taken off."""
    return dict(json.loads(data.decode("utf-8", "surrogatepass")))
