"""Reads pictures and sounds in a conversation, and places the tokens that stand for them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from phimlx.errors import PromptError, shortened
from phimlx.sizes import counted

KINDS = ("image", "audio")
NAMES = {"image": "picture", "audio": "sound"}
FRAMES = 8  # pictures that a video becomes

EXAMPLE = (
    'A part is {"type": "text", "text": …}, {"type": "image", "image": …} or '
    '{"type": "audio", "audio": …}.'
)
# What a prompt that uses no template may write, as the reference's processor reads it.
MEDIA_TAG = re.compile(r"<\|(image|audio)_\d+\|>")

PlaceholderTokens = Mapping[str, int]
"""The token that stands for a piece of a picture, or of a sound, by the kinds a model takes."""


@dataclass(frozen=True)
class ContentPart:
    """A piece of a message: `kind` "text" with the text, or "image" or "audio" with its source."""

    kind: str
    value: Any


def no_media(name: str, sees: bool = False) -> PromptError:
    """Error of a model that reads text alone, or that takes pictures alone beside it."""
    return PromptError(
        f"{name} sees, but does not hear: it takes no sounds."
        if sees
        else f"{name} reads text alone: it takes no pictures or sounds.",
        hint="Use nano-multimodal, which comes along, or phi-4-multimodal.",
    )


def read_parts(place: str, parts: Sequence[Any]) -> tuple[ContentPart, ...]:
    """The parts of a message's content, stretches of text joined.

    Takes this module's form and OpenAI's: `{"type": "image_url", "image_url": {"url": …}}` with a
    data: or https: address, and `{"type": "input_audio", "input_audio": {"data": …}}` in base64.
    Raises PromptError, naming the part by its index, where one is none of these.
    """
    found: list[ContentPart] = []
    for index, part in enumerate(parts):
        read = _read_part(f"{place}.content[{index}]", part)
        if read.kind == "text" and found and found[-1].kind == "text":
            read = ContentPart("text", found.pop().value + read.value)
        found.append(read)
    if not found:
        raise PromptError(f"{place} is a message whose content is an empty list.", hint=EXAMPLE)
    return tuple(found)


def _read_part(place: str, part: Any) -> ContentPart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in _READERS:
        raise PromptError(
            f"{place} is no part of a message: its type is one of {', '.join(_READERS)}.",
            hint=EXAMPLE,
        )
    if part.get(kind) is None:
        raise PromptError(
            f"{place} has the type {shortened(kind)}, but no {shortened(kind)}.", hint=EXAMPLE
        )
    return _READERS[kind](place, part[kind])


def _read_text(place: str, text: Any) -> ContentPart:
    if not isinstance(text, str):
        raise PromptError(f"{place} has a text that is not text.", hint=EXAMPLE)
    return ContentPart("text", text)


def _read_image_url(place: str, value: Any) -> ContentPart:
    """A request may come from anywhere, so that an address is never the name of a file here."""
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str):
        url = ""
    scheme = url.partition(":")[0].lower()
    if scheme == "https":
        return ContentPart("image", url)
    if scheme != "data":
        raise PromptError(
            f"{place} has an image_url that is neither a data: nor an https: address.",
            hint='Send the picture itself: {"url": "data:image/png;base64,…"}.',
        )
    about, comma, data = url.partition(",")
    if not comma or not about.lower().endswith(";base64"):
        raise PromptError(
            f"{place} has a data: address without base64.",
            hint='Write it as "data:image/png;base64,…".',
        )
    return ContentPart("image", _decode(place, data))


def _read_input_audio(place: str, value: Any) -> ContentPart:
    data = value.get("data") if isinstance(value, Mapping) else None
    if not isinstance(data, str):
        raise PromptError(
            f"{place} has an input_audio without data.",
            hint='Send the sound itself: {"data": "…", "format": "wav"}, in base64.',
        )
    return ContentPart("audio", _decode(place, data))


def _decode(place: str, data: str) -> bytes:
    try:
        decoded = base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PromptError(f"{place} has data that is not base64.") from error
    if not decoded:
        raise PromptError(f"{place} has no data.")
    return decoded


_READERS: dict[str, Callable[[str, Any], ContentPart]] = {
    "text": _read_text,
    "image": lambda place, value: ContentPart("image", value),
    "audio": lambda place, value: ContentPart("audio", value),
    "image_url": _read_image_url,
    "input_audio": _read_input_audio,
}


def attach(
    messages: Sequence[Mapping[str, Any]], images: Sequence[Any], audio: Sequence[Any]
) -> list[Mapping[str, Any]]:
    """The messages with pictures and then sounds before what the user said last.

    Raises PromptError where no message is a user's.
    """
    given = [{"type": "image", "image": source} for source in images]
    given += [{"type": "audio", "audio": source} for source in audio]
    attached = list(messages)
    for index in range(len(attached) - 1 if given else -1, -1, -1):
        message = attached[index]
        if message.get("role") == "user":
            content = message.get("content") or []
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            if isinstance(content, list | tuple):  # anything else is an error, told elsewhere
                attached[index] = {**message, "content": [*given, *content]}
            return attached
    if given:
        raise PromptError(
            "The pictures and sounds go with a user's message, and there is none.",
            hint='Add a message {"role": "user", "content": "…"}.',
        )
    return attached


def expand_placeholders(
    ids: Sequence[int], placeholders: PlaceholderTokens, tokens: Mapping[str, Sequence[int]]
) -> tuple[list[int], list[str]]:
    """Ids in which each placeholder stands as often as its item has tokens, and the items' kinds.

    Args:
        ids: with one placeholder token for each item.
        tokens: how many each item has, by kind, in the order of the prompt.

    Raises:
        PromptError: where there are not as many placeholders as items.
    """
    for kind in placeholders:
        places, items = sum(token == placeholders[kind] for token in ids), len(tokens.get(kind, ()))
        if places != items:
            name = NAMES[kind]
            raise PromptError(
                f"The prompt has {counted(places, 'place')} for {name}s, but {items} came with it.",
                hint=f"Each needs its place, written <|{kind}_1|>, <|{kind}_2|>, … in raw text.",
            )
    kinds = {token: kind for kind, token in placeholders.items()}
    counts = {kind: iter(tokens.get(kind, ())) for kind in placeholders}
    expanded: list[int] = []
    order: list[str] = []
    for token in ids:
        if token in kinds:
            expanded += [token] * next(counts[kinds[token]])
            order.append(kinds[token])
        else:
            expanded.append(token)
    return expanded, order


def source_list(name: str, sources: Any) -> list[Any]:
    """Sources as a list, whether one was given or several; samples and their rate are one.

    Raises PromptError for what cannot be one.
    """
    if sources is None:
        return []
    several = isinstance(sources, list | tuple) and not _is_recording(sources)
    found = list(sources) if several else [sources]
    if any(source is None for source in found):
        raise PromptError(f"{name} holds nothing where a source should be: {shortened(sources)}.")
    return found


def _is_recording(sources: Sequence[Any]) -> bool:
    return isinstance(sources, tuple) and len(sources) == 2 and isinstance(sources[1], Integral)
