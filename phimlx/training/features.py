"""Features of pictures and sounds from frozen encoders: computed once, and kept on the disk.

What an encoder makes depends on what is seen or heard and on the encoder alone, not on what is
trained. So an epoch costs what text costs, and the losses are the same with and without.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from phimlx.checkpoint.arrays import write_arrays
from phimlx.checkpoint.header import read_header
from phimlx.errors import PhimlxError
from phimlx.files import reason, replacing
from phimlx.folders import cache_folder
from phimlx.models.multimodal import MultimodalLM
from phimlx.training.data.media import MediaItem, MediaReader

NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
FEATURES = "features"
SHARERS = 8  # processes that may fill one folder together without passing its limit


def features_folder() -> Path:
    """Folder of the kept features."""
    return cache_folder() / "features"


class FeatureStore:
    """Features on the disk, each in a file named by what it was made from.

    Nothing that goes wrong with it is an error: it is said once, and features are computed. Several
    processes may use one folder: a file appears when it is whole.

    Args:
        identity: tells the encoders and what runs them.
        limit: bytes of all files; what was used longest ago makes room, but nothing that has been
            used since this run began.
        note: called with a sentence where nothing more can be kept.
    """

    def __init__(
        self,
        identity: str,
        limit: int,
        note: Callable[[str], object] = lambda text: None,
        folder: Path | None = None,
    ) -> None:
        self.folder = folder or features_folder()
        self._identity = identity.encode()
        self._limit = limit
        self._note = note
        self._noted = False
        self._began = time.time() - 1  # the clock of files is a little behind
        self._total = 0  # bytes of all files when they were last counted, and of those since
        self._count_at = 0  # that total, from which on they are counted again

    def read(self, item: MediaItem) -> mx.array | None:
        """Find the features of an item; None where they are not here."""
        path = self._path(item)
        try:
            found = self._checked(path, item)
        except (OSError, PhimlxError, RuntimeError, KeyError):
            found = None
        if found is None:
            return None
        with suppress(OSError):
            if path.stat().st_mtime < self._began:
                os.utime(path)
        return found

    def write(self, item: MediaItem, features: mx.array) -> None:
        """Keep the features of an item, where there is room; nothing more once there was none."""
        if self._noted:
            return
        path = self._path(item)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._has_room(features.nbytes):
                self._say("the store of features is full; raise its limit with --feature-store")
                return
            with replacing(path, private=True) as temporary:
                write_arrays(temporary, {FEATURES: features, "digest": digest_of(features)})
            self._total += path.stat().st_size
        except OSError as failure:
            self._say(f"features cannot be kept in {self.folder}: {reason(failure)}")

    def _checked(self, path: Path, item: MediaItem) -> mx.array | None:
        if not path.is_file() or dict(read_header(path)).keys() != {FEATURES, "digest"}:
            return None
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        features = arrays[FEATURES]
        mx.eval(arrays)
        whole = features.ndim == 2 and features.shape[0] == item.tokens
        if not whole or not mx.array_equal(arrays["digest"], digest_of(features)).item():
            return None
        return features

    def _has_room(self, nbytes: int) -> bool:
        if self._total + nbytes <= self._count_at:
            return True
        entries = []
        for entry in os.scandir(self.folder):
            if NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # another process has made room
                    entries.append((entry.stat(), Path(entry.path)))
        self._total = sum(status.st_size for status, _ in entries)
        for status, path in sorted(entries, key=lambda entry: entry[0].st_mtime):
            if self._total + nbytes <= self._limit or status.st_mtime >= self._began:
                break
            with suppress(OSError):
                path.unlink()
            self._total -= status.st_size
        self._count_at = self._total + (self._limit - self._total) // SHARERS
        return self._total + nbytes <= self._limit

    def _path(self, item: MediaItem) -> Path:
        name = hashlib.sha256(self._identity + b"\0" + item.key).hexdigest()
        return self.folder / f"{name}.safetensors"

    def _say(self, text: str) -> None:
        self._noted = True
        self._note(f"From here on {text}.")


class EncodedMedia:
    """Makes or finds the features of pictures and sounds.

    Args:
        reader: opens them.
        store: None for none.
    """

    def __init__(
        self, model: MultimodalLM, reader: MediaReader, store: FeatureStore | None = None
    ) -> None:
        self.model, self.reader, self.store = model, reader, store

    def __call__(self, item: MediaItem) -> mx.array:
        """Return features before any projection, `[tokens, width]`.

        Raises:
            TrainingError: where the item is not what it was when it was read.
        """
        found = None if self.store is None else self.store.read(item)
        if found is None:
            found = self._encode(item)
            if self.store is not None:
                self.store.write(item, found)
        return found

    def _encode(self, item: MediaItem) -> mx.array:
        arrays = {name: mx.array(array) for name, array in self.reader.open(item).items()}
        features = self.model.encode_frozen(**arrays)
        rows = features.images if item.kind == "image" else features.audio
        assert rows is not None
        mx.eval(rows)
        mx.clear_cache()
        return rows


def digest_of(array: mx.array) -> mx.array:
    """Compute the SHA-256 of an array's bytes, as an array."""
    found = hashlib.sha256(memoryview(array.view(mx.uint8))).digest()  # type: ignore[arg-type]
    return mx.array(list(found), mx.uint8)
