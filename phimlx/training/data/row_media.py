"""Pictures, sounds and videos of a row, in the forms that data files have -> items of messages.

A part of a message's content is `{"type": "image", …}` with its source under `image`, `path`,
`url` or `bytes`; OpenAI's `image_url` and `input_audio`; or Hugging Face's, whose source may be an
object `{"bytes", "path"}` and may stand in a column of the row, in the order of the places. A
place is a part without a source, or `<image>` in a text, as LLaVA's files have it. What has no
place comes before the text of the first message of a user.
"""

from __future__ import annotations

import base64
import binascii
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phimlx.errors import MediaError, shortened
from phimlx.media.kinds import kind_of
from phimlx.media.source import is_url
from phimlx.prompt.media_parts import ContentPart
from phimlx.training.data.media import MediaItem, MediaReader, MediaRoot
from phimlx.training.data.row_messages import RowError, Turn

KINDS = ("image", "video", "audio")
NAMES = {"image": "pictures", "video": "videos", "audio": "sounds"}
TAGS = {f"<{kind}>": kind for kind in KINDS}
# Types of parts, beside the kinds themselves, and the kind that each means.
OTHER_TYPES = {
    "image_url": "image",
    "input_image": "image",
    "audio_url": "audio",
    "input_audio": "audio",
    "video_url": "video",
}
FILE_NAME = "file_name"  # of the Hub's folders of pictures or sounds

Part = dict[str, Any]


class RowMedia:
    """What one row shows and plays, opened as its places are met.

    Args:
        reader: of the model.
        root: what paths are relative to.
        values: the row.
        mapping: the row's own key by the name of a kind.

    Attributes:
        used: the keys of columns that hold some.
    """

    def __init__(
        self,
        reader: MediaReader,
        root: MediaRoot,
        values: Mapping[str, Any],
        mapping: Mapping[str, str],
    ) -> None:
        self.reader, self.root = reader, root
        self.used: set[str] = set()
        self._given: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        for kind in KINDS:
            for key in (mapping.get(kind, kind), f"{kind}s"):
                if _is_given(values.get(key)):
                    self.used.add(key)
                    value = values[key]
                    several = isinstance(value, list | tuple) and not (
                        _is_bytes_or_samples(value) or (kind == "video" and _are_frames(value))
                    )
                    self._given[kind] += value if several else [value]
        name = values.get(FILE_NAME)
        if not self.used and isinstance(name, str) and (found := kind_of(name)) is not None:
            self.used.add(FILE_NAME)
            self._given[found].append(name)
        self.begin_again()

    def begin_again(self) -> None:
        """Forget which places have been met, for the row's second conversation about the same."""
        self._waiting = {kind: deque(given) for kind, given in self._given.items()}
        self._tagged: set[str] = set()  # kinds that have had a place in a text

    def content(self, place: str, content: Any) -> Any:
        """Read the content of a message: text that has places, or a list of parts.

        Raises:
            MediaError: naming the part by its index, where something cannot be opened.
        """
        if isinstance(content, str):
            parts = [{"type": "text", "text": content}]
            found = [each for part in parts for each in self._divided(place, part)]
            return content if found == parts else found
        if not isinstance(content, list | tuple):
            return content
        read: list[Any] = []
        for index, part in enumerate(content):
            if not isinstance(part, Mapping):
                return content  # which is told elsewhere
            read += self._part(f"{place}.content[{index}]", part)
        return read

    def attached(self, turns: Sequence[Turn]) -> list[Turn]:
        """Put what had no place, in the order of kinds, before the first words of the user.

        Raises:
            RowError: where nothing is the user's.
            MediaError: where something cannot be opened.
        """
        rest = tuple(
            ContentPart(part["type"], part[part["type"]])
            for kind in KINDS
            for source in _taken(self._waiting[kind])
            for part in self._opened(f"the column {kind}", kind, source)
        )
        if not rest:
            return list(turns)
        for index, turn in enumerate(turns):
            if turn.message.role == "user":
                parts = turn.message.parts or (ContentPart("text", turn.message.content),)
                put = turn._replace(message=replace(turn.message, parts=(*rest, *parts)))
                return [*turns[:index], put, *turns[index + 1 :]]
        raise RowError("It has pictures or sounds, and no message of the user for them.")

    @property
    def left(self) -> str:
        """Name the kinds that nothing has been made of; empty where there are none."""
        return " and ".join(NAMES[kind] for kind in KINDS if self._waiting[kind])

    def _part(self, place: str, part: Mapping[str, Any]) -> Iterator[Part]:
        # A table has every key in every part, empty where it means nothing.
        given = {key: value for key, value in part.items() if value is not None}
        name = given.get("type")
        kind = OTHER_TYPES.get(name, name) if isinstance(name, str) else None
        if kind == "text" and isinstance(given.get("text"), str):
            yield from self._divided(place, given)
        elif kind not in KINDS:
            yield dict(given)  # which is told elsewhere
        else:
            source = _source_in(given, kind, str(name))
            if source is None:
                source = self._next(place, kind)
            yield from self._opened(place, kind, source)

    def _divided(self, place: str, part: Mapping[str, Any]) -> Iterator[Part]:
        """Divide a text at the places that it has, where a column has something for them."""
        text = str(part["text"])
        while True:
            found = [
                (at, tag) for tag, kind in TAGS.items()
                if (self._waiting[kind] or kind in self._tagged) and (at := text.find(tag)) >= 0
            ]  # fmt: skip
            if not found:
                break
            at, tag = min(found)
            if text[:at]:
                yield {"type": "text", "text": text[:at]}
            self._tagged.add(TAGS[tag])
            yield from self._opened(place, TAGS[tag], self._next(place, TAGS[tag]))
            text = text[at + len(tag) :].removeprefix("\n")
        if text:
            yield {"type": "text", "text": text}

    def _next(self, place: str, kind: str) -> Any:
        if not self._waiting[kind]:
            raise MediaError(
                f"{place} is a place for {NAMES[kind]}, and the row has none left.",
                hint=f'Say where it is: {{"type": "{kind}", "path": …}}, or have as many in the '
                f"column {kind}s as there are places.",
            )
        return self._waiting[kind].popleft()

    def _opened(self, place: str, kind: str, source: Any) -> Iterator[Part]:
        try:
            items = self._items(kind, source)
        except MediaError as error:
            raise MediaError(f"{place}: {error}", hint=error.hint) from error
        for item in items:
            yield {"type": item.kind, item.kind: item}

    def _items(self, kind: str, source: Any) -> list[MediaItem]:
        if kind == "video" and isinstance(source, list | tuple):  # its frames
            return [item for each in source for item in self._items("image", each)]
        return self.reader.read(kind, self._resolved(kind, source))

    def _resolved(self, kind: str, source: Any) -> Any:
        """Turn a source into bytes, samples, an address that is followed, or a file in reach."""
        if isinstance(source, Mapping):
            return self._of_object(kind, source)
        if isinstance(source, bytes | bytearray | memoryview):
            return bytes(source)
        if isinstance(source, str) and source[:5].lower() == "data:":
            about, comma, data = source.partition(",")
            if not comma or not about.lower().endswith(";base64"):
                raise MediaError(
                    "This is a data: address without base64.",
                    hint='Write it as "data:image/png;base64,…".',
                )
            return decoded(data)
        if isinstance(source, str) and is_url(source):
            return source
        if isinstance(source, str) and source.strip():
            return self.root.resolve(source)
        if isinstance(source, tuple):
            return source
        raise MediaError(
            f"{shortened(source)} is no source of {NAMES[kind]}.",
            hint="Name a file, an https address, or give the bytes.",
        )

    def _of_object(self, kind: str, source: Mapping[str, Any]) -> Any:
        """Read the Hub's object of bytes and path, or of samples and their rate."""
        given = {key: value for key, value in source.items() if value is not None}
        if "array" in given:
            import numpy as np

            rate = given.get("sampling_rate")
            if type(rate) is not int:
                raise MediaError("There are samples without their sampling_rate.")
            try:
                return np.asarray(given["array"], np.float32), rate
            except (TypeError, ValueError) as error:
                raise MediaError("The samples are no list of numbers.") from error
        inner = _source_in(given, kind, kind)
        if inner is None or isinstance(inner, Mapping):
            raise MediaError(
                f"{shortened(dict(list(source.items())[:4]))} is no source of {NAMES[kind]}.",
                hint='An object has "bytes", "path" or "url".',
            )
        return self._resolved(kind, inner)


def decoded(data: str) -> bytes:
    """Decode base64; raises MediaError where it is none."""
    try:
        found = base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError("This is not base64.") from error
    if not found:
        raise MediaError("There are no bytes.")
    return found


def _source_in(part: Mapping[str, Any], kind: str, name: str) -> Any:
    """Find the source in a part; None where there is none."""
    for key in ("bytes", "data", "base64"):
        value = part.get(key)
        if isinstance(value, str):
            return decoded(value)
        if value:
            return value
    for key in (kind, name, f"{kind}_url", "url"):
        value = part.get(key)
        if isinstance(value, Mapping) and (inner := _source_in(value, kind, name)) is not None:
            return inner
        if value is None or isinstance(value, Mapping):
            continue
        if key in (f"{kind}_url", "url") and not _is_address(value):
            raise MediaError(
                f"{shortened(value)} is neither a data: nor an https: address.",
                hint='Name a file as {"path": …}.',
            )
        return value
    if "array" in part:
        return part
    return part.get("path") or None


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and (value[:5].lower() == "data:" or is_url(value))


def _is_given(value: Any) -> bool:
    if isinstance(value, str | bytes | list | tuple | Mapping):
        return bool(value)
    return False


def _is_bytes_or_samples(value: Sequence[Any]) -> bool:
    return all(isinstance(each, int | float) for each in value[:2])


def _are_frames(value: Sequence[Any]) -> bool:
    """Whether what a column of videos lists is the pictures of one."""
    return all(isinstance(each, str) and kind_of(each) == "image" for each in value)


def _taken(waiting: deque[Any]) -> Iterator[Any]:
    while waiting:
        yield waiting.popleft()


def root_of(path: Path, bounds: Path | None, chosen: Path | None) -> MediaRoot:
    """Return what the paths in a data file are relative to, and what they cannot leave.

    Args:
        path: the data file.
        bounds: the folder of its data set; that of the file itself where None.
        chosen: another folder for both, that the user has named.
    """
    if chosen is not None:
        return MediaRoot(chosen, chosen)
    return MediaRoot(path.parent, bounds or path.parent)
