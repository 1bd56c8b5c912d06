"""Limits of an image, sound or video, so that no file can exhaust the machine.

What reads a file compares before it decodes, and refuses by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phimlx.errors import MediaError, shortened
from phimlx.sizes import size_text


@dataclass(frozen=True)
class Limits:
    """The most that one image, sound or video may declare; far above what the model can use.

    Attributes:
        max_bytes: bytes of one file, and of bytes given.
        max_download: bytes of one file from a URL.
        max_pixels: width × height of one picture, or of one frame of a video.
        max_aspect: longer side over shorter side of a picture.
        max_seconds: length of one sound.
        max_frames: pictures taken from one video.
        allow_urls: whether a source may be a URL.
        allow_private: whether a URL may lead to this machine or its own network.
        download_seconds: longest time for one file from a URL.
    """

    max_bytes: int = 1_000_000_000
    max_download: int = 100_000_000
    max_pixels: int = 100_000_000
    max_aspect: float = 200.0
    max_seconds: float = 4 * 3600.0
    max_frames: int = 64
    allow_urls: bool = True
    allow_private: bool = False
    download_seconds: float = 120.0


def out_of_memory(name: str) -> MediaError:
    """Make the refusal of a file whose decoding took all memory: it is not damaged."""
    return MediaError(
        f"{name} needs more memory than there is.",
        hint="Close other programs, or give a smaller file.",
    )


def source_name(source: object) -> str:
    """Name a source in a message: the path or URL as it was given, or `The data`."""
    if isinstance(source, str | Path):
        text = str(source)
        return text if len(text) <= 200 and text.isprintable() else shortened(text, 200)
    return "The data"


def check_size(source: object, size: int, most: int, limit: str = "max_bytes") -> None:
    """Refuse a source of `size` bytes where that is more than `most`.

    Raises:
        MediaError: names the limit that may be raised.
    """
    if size > most:
        raise MediaError(
            f"{source_name(source)} is larger than {size_text(most)}.", hint=raising(limit)
        )


def raising(limit: str) -> str:
    """Make the hint where a limit is passed: `--max-pixels` for "max_pixels"."""
    return f"If you trust it, raise the limit with --{limit.replace('_', '-')}."
