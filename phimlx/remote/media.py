"""Pictures and sounds as parts of a request: read and checked here, as for a model loaded here."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phimlx.media.limits import Limits

FILES = (str, Path, bytes)


def media_part(part: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Make OpenAI's form of a part of `phimlx.prompt.media_parts`.

    A file goes along as it is; what has been decoded, as PNG or WAV, without loss.

    Raises:
        MediaError: where it cannot be read, or is larger than the limits allow.
    """
    kind, source = part["type"], part[part["type"]]
    if isinstance(source, FILES):
        from phimlx.media.source import read_bytes

        source = read_bytes(source, limits)
    if kind == "image":
        from phimlx.media.image_file import load_image

        image = load_image(source, limits)
        data = source if isinstance(source, bytes) else _png(image)
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_text(data)}"}}
    from phimlx.media.audio import load_audio
    from phimlx.media.log_mel import AudioClip

    clip = source if isinstance(source, AudioClip) else load_audio(source, limits)
    data = source if isinstance(source, bytes) else _wav(clip)
    return {"type": "input_audio", "input_audio": {"data": _text(data), "format": "wav"}}


def _text(data: bytes) -> str:
    return b64encode(data).decode()


def _png(image: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=1)
    return data.getvalue()


def _wav(clip: Any) -> bytes:
    import soundfile  # type: ignore[import-untyped]

    data = io.BytesIO()
    soundfile.write(data, clip.samples, clip.rate, format="WAV", subtype="FLOAT")
    return data.getvalue()
