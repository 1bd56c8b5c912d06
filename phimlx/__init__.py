"""phimlx: Microsoft's Phi-4 family on Apple's MLX, exactly as the reference runs it.

>>> import phimlx
>>> phi = phimlx.load("nano")
>>> phi.generate("What is 3 + 4?").text
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phimlx.api import Phi, load
    from phimlx.errors import PhimlxError
    from phimlx.generation.reply import Chunk, Reply, Stats
    from phimlx.generation.stream import Stream
    from phimlx.tools.chat import ChatResult

__version__ = "0.1.0"

# Where each name lives; importing phimlx itself imports nothing heavy.
_HOMES = {
    "load": "phimlx.api",
    "Phi": "phimlx.api",
    "ChatResult": "phimlx.tools.chat",
    "Chunk": "phimlx.generation.reply",
    "Reply": "phimlx.generation.reply",
    "Stats": "phimlx.generation.reply",
    "Stream": "phimlx.generation.stream",
    "PhimlxError": "phimlx.errors",
}

__all__ = ["ChatResult", "Chunk", "Phi", "PhimlxError", "Reply", "Stats", "Stream", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'phimlx' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
