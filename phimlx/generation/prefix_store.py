"""Prefixes on disk: caches of long prompts, for whoever asks about the same text again.

A file's name tells its first tokens, its key and how many tokens it holds, so that few files are
opened for a prompt: those that begin as it does. The file's own time is when it was last used.
Several processes may use one folder: a file appears when it is whole, and who has opened it keeps
it though another removes it.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from phimlx.errors import CacheError, PhimlxError, SettingsError, shortened
from phimlx.files import reason
from phimlx.folders import cache_folder
from phimlx.generation.placed_media import MediaItem
from phimlx.generation.prefix_file import (
    PrefixKey,
    Source,
    key_of,
    open_prefix,
    write_prefix,
)
from phimlx.generation.prompt_cache import PromptCache, shared_tokens
from phimlx.models.base import CausalLM
from phimlx.models.cache.disk import KVLayout
from phimlx.sizes import size_text

MIN_TOKENS = 1024  # a prompt up to this many is computed sooner than it is worth keeping
BLOCK = 256  # first tokens that a name tells, and the least that a file must add
LIMIT = 10_000_000_000  # bytes
LIMIT_VARIABLE = "PHIMLX_CACHE_LIMIT"
ABANDONED = 3600.0  # seconds after which a file that is still being written was left behind

NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})-([1-9][0-9]{0,8})-[0-9a-f]{16}\.safetensors")
UNFINISHED = re.compile(r"\.[0-9a-f-]{52,61}\.[0-9a-f]{8}\.safetensors")


@dataclass(frozen=True)
class Entry:
    """A file of the store."""

    path: Path
    begin: str
    key: str
    tokens: int
    nbytes: int
    used: float

    @property
    def last_used(self) -> datetime:
        return datetime.fromtimestamp(self.used, UTC)

    def remove(self) -> None:
        """Delete the file; nothing where it is gone or cannot be. Who reads it goes on."""
        with suppress(OSError):
            self.path.unlink()


def prefixes_folder() -> Path:
    """Folder of the kept prefixes."""
    return cache_folder() / "prefixes"


def prefixes_limit() -> int:
    """Bytes that all prefixes may take: PHIMLX_CACHE_LIMIT, in GB, else 10 GB.

    Raises:
        SettingsError: where that is no number.
    """
    given = os.environ.get(LIMIT_VARIABLE)
    if given is None:
        return LIMIT
    try:
        return max(0, int(float(given) * 1e9))
    except (ValueError, OverflowError):
        raise SettingsError(
            f"{LIMIT_VARIABLE} is {shortened(given)}; it must be a number of GB, or 0 for no cache."
        ) from None


def list_entries(folder: Path) -> list[Entry]:
    """List the files of a store, the one used last first; others beside them do not count.

    Raises:
        OSError: where the folder is there and cannot be read.
    """
    found = []
    for name, path, status in _scan(folder):
        match = NAME.fullmatch(name)
        if match:
            begin, key, tokens = match.groups()
            size, used = status.st_size, status.st_mtime
            found.append(Entry(path, begin, key, int(tokens), size, used))
    return sorted(found, key=lambda entry: -entry.used)


def remove_unfinished(folder: Path, older: float = 0.0) -> None:
    """Delete files that were being written when their process ended.

    Args:
        older: seconds since the last change.
    """
    for name, path, status in _scan(folder):
        if UNFINISHED.fullmatch(name) and time.time() - status.st_mtime >= older:
            with suppress(OSError):
                path.unlink()


class PrefixStore:
    """The prefixes of one model among those that a folder keeps.

    Nothing that goes wrong with it is an error: it is said, and the prompt is computed.

    Args:
        identify: tells which model it is with which of its loaded adapters, once that is needed;
            raises CacheError or OSError where that cannot be told.
        note: called with a sentence where a file is of no use, or none can be written.
        folder: in the cache folder of phimlx where None.
        limit: bytes of all prefixes of all models; `prefixes_limit` where None.
        min_tokens: prompts with fewer are neither kept nor looked for.

    Attributes:
        limit: as given.
    """

    def __init__(
        self,
        model: CausalLM,
        identify: Callable[[str | None], Source],
        note: Callable[[str], object] = lambda text: None,
        folder: Path | None = None,
        limit: int | None = None,
        min_tokens: int = MIN_TOKENS + 1,
    ) -> None:
        self._model = model
        self._identify = identify
        self._note = note
        self._said: set[str] = set()
        self._folder = folder or prefixes_folder()
        self.limit = prefixes_limit() if limit is None else limit
        self._min_tokens = max(min_tokens, BLOCK)

    def find(
        self,
        prompt: list[int],
        items: tuple[MediaItem, ...],
        adapter: str | None,
        loaded: str | None,
        kv_bits: int | None,
        shared: int,
    ) -> PromptCache | None:
        """Read the cache that shares most with a prompt.

        Args:
            prompt: tokens.
            items: images and sounds in it.
            adapter: that it calls for, of those that the model's checkpoint holds.
            loaded: that it uses, of those that were loaded beside the model.
            kv_bits: what keys and values are quantized to.
            shared: tokens that are at hand; None is returned unless there are enough more.
        """
        if len(prompt) < self._min_tokens:
            return None
        try:
            begin = _digest(prompt[:BLOCK], items)
            entries = [entry for entry in list_entries(self._folder) if entry.begin == begin]
            if not entries:
                return None
            layout = KVLayout(self._model, kv_bits)
            table = self._model.config.rope.table(len(prompt))
            source = self._identify(loaded)
            key = PrefixKey.of(self._model, source, layout, table, adapter)
        except (OSError, PhimlxError) as error:
            self._say("Kept prompts are not looked at", error)
            return None
        for common, entry in self._compare(entries, key, prompt[:-1], items):
            if common < shared + BLOCK:
                return None
            try:
                with open_prefix(entry.path) as file:
                    file.check(key)
                    found = file.load(self._model, layout, loaded)
            except (OSError, CacheError) as error:
                self._drop(entry, error)
                continue
            with suppress(OSError):
                os.utime(entry.path)
            return found
        return None

    def save(self, cache: PromptCache) -> None:
        """Keep what a cache holds, in place of beginnings of it, unless nearly all of it is kept.

        What was used longest ago goes where there is no room.
        """
        kv = cache.kv
        if kv.length < self._min_tokens or not kv.rope.serves(kv.long[0], kv.long[0]):
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            layout = KVLayout(self._model, cache.kv_bits)
            source = self._identify(kv.loaded[0])
            key = key_of(cache, source, layout)
            tokens, items = cache.tokens, cache.items
            begin = _digest(tokens[:BLOCK], items)
            entries = [entry for entry in list_entries(self._folder) if entry.begin == begin]
            kept = self._compare(entries, key, tokens, items)
            if kept and kept[0][0] > kv.length - MIN_TOKENS and kept[0][0] > kv.length // 2:
                return
            needed = layout.nbytes(kv.length)
            if needed > self.limit:
                self._note_once(
                    f"This prompt is not kept: it takes {size_text(needed)}, and all may take "
                    f"{size_text(self.limit)} ({LIMIT_VARIABLE})."
                )
                return
            remove_unfinished(self._folder, ABANDONED)
            self._make_room(needed)
            name = f"{begin}-{key.digest[:16]}-{kv.length}-{_digest(tokens, items)}.safetensors"
            write_prefix(self._folder / name, cache, source)
            for common, entry in kept:
                if common == entry.tokens and entry.path.name != name:
                    entry.remove()
            self._make_room(0)
        except (OSError, PhimlxError) as error:
            self._say("This prompt is not kept", error)

    def _compare(
        self,
        entries: Iterable[Entry],
        key: PrefixKey,
        tokens: Sequence[int],
        items: Sequence[MediaItem],
    ) -> list[tuple[int, Entry]]:
        """Count the tokens that entries of a key share with others; those with most first."""
        found: list[tuple[int, Entry]] = []
        same = [entry for entry in entries if entry.key == key.digest[:16]]
        for entry in sorted(same, key=lambda entry: -entry.tokens):
            try:
                with open_prefix(entry.path) as file:
                    common = shared_tokens(file.read_tokens(), file.items, tokens, items)
            except (OSError, CacheError) as error:
                self._drop(entry, error)
                continue
            found.append((common, entry))
        return sorted(found, key=lambda pair: -pair[0])

    def _make_room(self, needed: int) -> None:
        """Delete what was used longest ago until so many bytes more are within the limit."""
        left = self.limit - needed
        for entry in list_entries(self._folder):
            left -= entry.nbytes
            if left < 0:
                entry.remove()

    def _drop(self, entry: Entry, error: Exception) -> None:
        """Say that a file is of no use, and delete it; nothing where it is gone already."""
        if entry.path.exists():
            self._say("A kept prompt is ignored, and deleted", error)
            entry.remove()

    def _say(self, what: str, error: Exception) -> None:
        why = f"{reason(error)}." if isinstance(error, OSError) else str(error)
        self._note_once(f"{what}: {why}")

    def _note_once(self, text: str) -> None:
        """Say something that may hold for every turn of a chat."""
        if text not in self._said:
            self._said.add(text)
            self._note(text)


def _digest(tokens: Sequence[int], items: Iterable[MediaItem]) -> str:
    """Digest tokens and the media that begin among them, to 16 digits."""
    beside = [
        [item.kind, item.digest.hex(), item.begin, *item.beyond]
        for item in items
        if item.begin < len(tokens)
    ]
    return sha256(json.dumps([list(tokens), beside]).encode()).hexdigest()[:16]


def _scan(folder: Path) -> Iterator[tuple[str, Path, os.stat_result]]:
    """Look at what a folder holds; nothing where it is not there."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        with suppress(FileNotFoundError):
            yield name, folder / name, os.lstat(folder / name)
