"""Pictures, sounds and videos that go with a message in a chat: read once, shown, saved by path."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from phimlx.errors import MediaError, PhimlxError
from phimlx.history.messages import KINDS
from phimlx.media.kinds import SUFFIXES, kind_of
from phimlx.prompt.media_parts import FRAMES
from phimlx.sizes import counted

if TYPE_CHECKING:
    from phimlx.media.limits import Limits

# A name in quotes, or one whose blanks are escaped, and what follows it.
_NAME = re.compile(r"""(?:'([^']*)'|"([^"]*)"|(?!['"])((?:\\.|[^\\\s])+))(?:\s+(.*))?""", re.DOTALL)


@dataclass(frozen=True)
class Attachment:
    """A file that goes with a message.

    Attributes:
        path: an absolute path, or a URL.
        sha256: of the file's bytes, in hexadecimal digits.
        frames: how many pictures of a video are asked for.
        parts: what the model is given, as parts of a message.
        about: its size, for people.
    """

    kind: str
    path: str
    sha256: str
    frames: int | None
    parts: tuple[dict[str, Any], ...]
    about: str

    @classmethod
    def read(
        cls, kind: str, path: str, limits: Limits | None = None, frames: int | None = None
    ) -> Attachment:
        """Read a file of that kind; raises `MediaError` where it is none, or too large."""
        from phimlx.media.source import read_bytes

        return cls.decode(kind, path, read_bytes(path, limits), limits, frames)

    @classmethod
    def decode(
        cls,
        kind: str,
        path: str,
        data: bytes,
        limits: Limits | None = None,
        frames: int | None = None,
    ) -> Attachment:
        """Decode what was read from `path`; raises `MediaError` as `read`."""
        from phimlx.media.limits import source_name
        from phimlx.media.source import is_url

        if kind == "video":
            frames = frames or FRAMES
        try:
            parts, about = _DECODERS[kind](data, limits, frames or 0)
        except MediaError as error:
            raise MediaError(f"{source_name(path)}: {error}", error.hint) from error
        place = path if is_url(path) else str(Path(path).absolute())
        return cls(kind, place, digest(data), frames if kind == "video" else None, parts, about)

    @property
    def saved(self) -> dict[str, Any]:
        """The part of a message that stands for it where a chat is kept."""
        part = {"type": self.kind, "path": self.path, "sha256": self.sha256}
        return part | ({} if self.frames is None else {"frames": self.frames})

    def __str__(self) -> str:
        return f"{KINDS[self.kind]} {Path(self.path).name} ({self.about})"


def digest(data: bytes) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


Parts = tuple[tuple[dict[str, Any], ...], str]


def _decode_image(data: bytes, limits: Limits | None, frames: int) -> Parts:
    from phimlx.media.image import load_image

    image = load_image(data, limits)
    return ({"type": "image", "image": image},), f"{image.width} × {image.height}"


def _decode_audio(data: bytes, limits: Limits | None, frames: int) -> Parts:
    from phimlx.media.audio import load_audio

    clip = load_audio(data, limits)
    return ({"type": "audio", "audio": clip},), f"{clip.seconds:.1f} s"


def _decode_video(data: bytes, limits: Limits | None, frames: int) -> Parts:
    from phimlx.media.video import read_video

    found = read_video(data, frames, limits)
    parts = tuple({"type": "image", "image": frame.image} for frame in found)
    return parts, f"{counted(len(parts), 'picture')} of it"


_DECODERS: dict[str, Callable[[bytes, Limits | None, int], Parts]] = {
    "image": _decode_image,
    "audio": _decode_audio,
    "video": _decode_video,
}


def in_order(attachments: Sequence[Attachment]) -> list[Attachment]:
    """Sort attachments as the model was trained to get them: images, then audio."""
    return sorted(attachments, key=lambda attachment: attachment.kind == "audio")


def split_name(argument: str) -> tuple[str, str]:
    """Split a command's argument into the name of a file and what follows it.

    Raises `PhimlxError` where there is none.
    """
    if Path(argument).expanduser().is_file():
        return str(Path(argument).expanduser()), ""
    match = _NAME.fullmatch(argument)
    if not match or not any(match.groups()[:3]):
        raise PhimlxError("Which file?", "Name it, in quotes where its name has blanks.")
    single, double, bare, rest = match.groups()
    name = single or double or re.sub(r"\\(.)", r"\1", bare)
    return str(Path(name).expanduser()) if "://" not in name else name, rest or ""


def dropped_files(line: str) -> list[tuple[str, str]]:
    """Find the kinds and paths of media files whose names are all that a line holds; else empty.

    That is what a terminal types when files are dropped on it: quoted names, names with escaped
    blanks, or file: addresses.
    """
    text = line.strip()
    if not text.rstrip("'\"").lower().endswith(tuple(sum(SUFFIXES.values(), ()))):
        return []
    whole = media_file(text)
    if whole:
        return [whole]
    try:
        names = shlex.split(text)
    except ValueError:  # a quote that is not closed
        return []
    found = [media_file(name) for name in names]
    return [file for file in found if file] if all(found) else []


def media_file(name: str) -> tuple[str, str] | None:
    """Return the kind and path of a file that is there, by its name; None for any other."""
    if name.startswith("file://"):
        name = unquote(urlsplit(name).path)
    path = Path(name).expanduser()
    kind = kind_of(name)
    try:
        return (kind, str(path)) if kind is not None and path.is_file() else None
    except (OSError, ValueError):  # too long for a name, or with a null byte
        return None
