"""Pictures and sounds of rows: opened once to be checked and counted, and again to be learned."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phimlx.errors import MediaError, TrainingError, shortened
from phimlx.files import translate_write_errors
from phimlx.hub.layout import home_of
from phimlx.media.limits import Limits
from phimlx.media.source import read_bytes
from phimlx.models.features import Placeholders
from phimlx.models.phi4mm.conformer import audio_tokens
from phimlx.prompt.media_parts import FRAMES

if TYPE_CHECKING:
    from phimlx.generation.placed_media import Media
    from phimlx.models.base import CausalLM

FRAMES_A_TOKEN = 8  # log-mel frames that a sound's token is made of

Arrays = Mapping[str, Any]
"""What the encoders take, under the names of the checkpoint's own processor."""


@dataclass(frozen=True)
class MediaItem:
    """A picture or a sound of a row; equal ones have equal features.

    Attributes:
        kind: "image" or "audio".
        digest: of what is seen or heard, whatever file holds it.
        tokens: that it fills.
        source: what `open` takes it from again.
        frames: of a sound; 0 of a picture.
        padded: frames to which a sound is padded among others of its row; None where it is alone.
        begin: its first token's place in its example.
    """

    kind: str
    digest: bytes
    tokens: int
    source: Any = field(compare=False, repr=False)
    frames: int = 0
    padded: int | None = None
    begin: int = field(default=0, compare=False)

    @property
    def key(self) -> bytes:
        """Tell apart what has other features."""
        beside = "" if self.padded is None else f"+{self.padded}"
        return f"{self.kind}{beside} ".encode() + self.digest


def beside_each_other(items: Sequence[MediaItem]) -> tuple[MediaItem, ...]:
    """Return the items of one row as they sound there.

    Several sounds are padded to the longest, as the original does it, and the last token of a
    shorter one hears of the padding as much as it lacks frames.
    """
    sounds = [item for item in items if item.kind == "audio"]
    if len(sounds) < 2:
        return tuple(items)
    longest = max(item.frames for item in sounds)
    return tuple(
        item
        if item.kind != "audio"
        else replace(item, padded=min(longest, FRAMES_A_TOKEN * audio_tokens(item.frames)))
        for item in items
    )


@dataclass(frozen=True)
class _Spooled:
    """Bytes that came inside a row, on the disk meanwhile."""

    offset: int
    length: int


class MediaReader:
    """Opens pictures, sounds and videos for one model.

    Args:
        placeholders: of the model.
        prepare_images: the model's own; see `Architecture.prepare_images`.
        limits: how large each may be.
    """

    def __init__(
        self,
        placeholders: Placeholders,
        prepare_images: Callable[..., Any],
        limits: Limits | None = None,
    ) -> None:
        self.placeholders = placeholders
        self.limits = limits or Limits()
        self._prepare_images = prepare_images
        self._spool: Any = None
        self._seen: dict[tuple[str, Path | str], list[MediaItem] | MediaError] = {}

    @classmethod
    def of(cls, model: CausalLM, folder: Path, limits: Limits | None = None) -> MediaReader | None:
        """Make the reader for a model, whose weights need not be there; None where it takes none.

        Args:
            folder: the model's, which says how pictures are prepared.
        """
        if model.placeholders is None:
            return None
        from phimlx.files import read_json

        settings = read_json(folder / "preprocessor_config.json", missing_ok=True)
        return cls(model.placeholders, model.architecture.prepare_images(settings), limits)

    @property
    def kinds(self) -> Mapping[str, int]:
        """The placeholder token of each kind that the model takes."""
        return self.placeholders.by_kind

    def read(self, kind: str, source: Any) -> list[MediaItem]:
        """Open a picture, a sound or a video, which is several pictures.

        What a path or an address leads to is opened once, however many rows name it.

        Args:
            source: a path, an https URL, bytes, an image, or samples and their rate.

        Raises:
            MediaError: where it cannot be had or read, is larger than the limits allow, or is of a
                kind that the model does not take.
        """
        if not isinstance(source, Path | str):
            return self._items(kind, source)
        found = self._seen.get((kind, source))
        if found is None:
            try:
                found = self._items(kind, source)
            except MediaError as error:
                found = error
            self._seen[kind, source] = found
        if isinstance(found, MediaError):
            raise MediaError(str(found), hint=found.hint) from found
        return found

    def open(self, item: MediaItem) -> Arrays:
        """Prepare an item for the encoders.

        Raises:
            TrainingError: where it is not what it was when it was read.
        """
        try:
            source = self._unspooled(item.source)
            prepared = self._prepared(item.kind, source)
        except MediaError as error:
            raise TrainingError(str(error), hint=error.hint) from error
        if prepared.digests != [item.digest]:
            raise TrainingError(
                f"{shortened(str(item.source), 200)} is not what it was when the data was read.",
                hint="Leave the data as it is while a run goes on; begin the run again.",
            )
        arrays = dict(prepared.arrays())
        if item.padded is not None:
            rows = arrays["input_audio_embeds"]
            beyond = item.padded - rows.shape[1]
            arrays["input_audio_embeds"] = np.pad(rows, [(0, 0), (0, beyond), (0, 0)])
            heard = np.arange(item.padded)[None] < item.frames
            arrays["audio_attention_mask"] = heard
        return arrays

    def sources(self, items: Sequence[MediaItem]) -> dict[str, list[Any]]:
        """Return what the items were read from, by kind, as prompts take it."""
        found: dict[str, list[Any]] = {"image": [], "audio": []}
        for item in items:
            found[item.kind].append(self._unspooled(item.source))
        return found

    def placed(self, items: Sequence[MediaItem]) -> Media:
        """Prepare all items of one prompt, in its order, as generation takes them.

        Raises:
            MediaError: where one cannot be read any more.
        """
        import mlx.core as mx

        from phimlx.generation.placed_media import Media

        arrays: dict[str, Any] = {}
        for kind, sources in self.sources(items).items():
            if sources:
                prepared = self._prepared(kind, *sources)
                arrays |= {name: mx.array(each) for name, each in prepared.arrays().items()}
        return Media(arrays, tuple((item.digest, item.tokens) for item in items))

    def _items(self, kind: str, source: Any) -> list[MediaItem]:
        if kind == "video":
            from phimlx.media.video import read_video

            frames = read_video(source, FRAMES, self.limits)
            return [self._item("image", _png(frame.image)) for frame in frames]
        if isinstance(source, str):  # an address, whose content is then what was read
            source = read_bytes(source, self.limits)
        return [self._item(kind, source)]

    def _item(self, kind: str, source: Any) -> MediaItem:
        if kind not in self.kinds:
            what = {"audio": "sounds", "image": "pictures"}[kind]
            raise MediaError(f"The model takes no {what}.", hint="phi-4-multimodal sees and hears.")
        prepared = self._prepared(kind, source)
        frames = 0
        if kind == "audio":
            frames = int(prepared.arrays()["input_audio_embeds"].shape[1])
        (digest,), (tokens,) = prepared.digests, prepared.tokens
        return MediaItem(kind, digest, tokens, self._spooled(source), frames)

    def _prepared(self, kind: str, *sources: Any) -> Any:
        if kind == "image":
            return self._prepare_images(sources, self.limits)
        from phimlx.media.audio import prepare_audio

        return prepare_audio(sources, self.limits)

    def _spooled(self, source: Any) -> Any:
        if not isinstance(source, bytes):
            return source
        if self._spool is None:
            self._spool = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the reader)
        with translate_write_errors(Path(tempfile.gettempdir()), TrainingError):
            offset = self._spool.seek(0, os.SEEK_END)
            self._spool.write(source)
        return _Spooled(offset, len(source))

    def _unspooled(self, source: Any) -> Any:
        if not isinstance(source, _Spooled):
            return source
        self._spool.seek(source.offset)
        return self._spool.read(source.length)


@dataclass(frozen=True)
class MediaRoot:
    """The folder that the paths in rows are relative to, and the one that they cannot leave.

    Data is not trusted: what it names is opened, so that it may name what came with it alone.
    """

    folder: Path
    bounds: Path

    def resolve(self, name: str) -> Path:
        """Find the file that a row names.

        Raises:
            MediaError: where it lies outside the folder, also by a link.
        """
        try:
            home = self.bounds.resolve()
            path = Path(os.path.normpath(self.folder.resolve() / name))
            real = Path(os.path.realpath(path))
        except (OSError, ValueError) as error:  # a null byte
            raise MediaError(f"{shortened(name, 200)} is no path.") from error
        if not path.is_relative_to(home) or not (
            real.is_relative_to(home) or real.is_relative_to(home_of(home))
        ):
            raise MediaError(
                f"{shortened(name, 200)} lies outside {self.bounds}.",
                hint="Rows name files beside their data file; name another folder that they may "
                "be in with --media-root.",
            )
        return path


def _png(image: Any) -> bytes:
    """Encode a frame without loss, so that it can be kept and read as any other picture."""
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
