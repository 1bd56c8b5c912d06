"""Prompt caches in files: what is written, and what must agree before one is read again.

A file is one safetensors file: tokens, keys and values as they are held, and the features of media,
without which a row that comes to need other rope factors could not be computed again. Its metadata
say which model they are of. Nothing of it is trusted: names, shapes, types and lengths are compared
with what the model itself would hold, and the contents with their checksum.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from phimlx.checkpoint.array_file import ArrayFile, open_array_file, write_array_file
from phimlx.checkpoint.tensors import ELEMENT_DTYPES
from phimlx.errors import CacheError, GenerationError, shortened
from phimlx.files import translate_write_errors
from phimlx.generation.placed_media import AUDIO, IMAGE, MediaItem
from phimlx.generation.prompt_cache import PromptCache
from phimlx.machine.device import backend
from phimlx.machine.kv_bits import check_kv_bits
from phimlx.models.base import CausalLM
from phimlx.models.cache.disk import TOKENS, KVLayout, arrays_of, restore, rope_digest
from phimlx.models.features import ADAPTERS

FORMAT, VERSION = "phimlx-prompt-cache", "1"
AGAIN = "Make it again with: phi.save_cache(cache, path)"

DIFFERENT = {
    "model": "{path} was made with another model.",
    "adapter": "{path} was made with another adapter, or without one.",
    "dtype": "{path} was computed in {theirs}, and the model computes in {ours}.",
    "kv_bits": "{path} holds keys and values at other bits: {theirs}, not {ours}.",
    "rope": "{path} was made with other rope factors.",
    "made_with": "{path} was made by {theirs}; this is {ours}.",
}


@dataclass(frozen=True)
class Source:
    """A model that keys and values are computed with, as it is told from others.

    Attributes:
        digest: of its files.
        adapter: digest of the files of the adapter beside it that a row uses; None for none.
        name: for people.
        path: its folder, for people.
    """

    digest: str
    adapter: str | None
    name: str
    path: str


@dataclass(frozen=True)
class PrefixKey:
    """All that keys and values depend on, beside tokens and media."""

    model: str
    adapter: str | None
    dtype: str
    kv_bits: int | None
    rope: str
    table: int
    row_adapter: str | None
    made_with: str

    @classmethod
    def of(
        cls,
        model: CausalLM,
        source: Source,
        layout: KVLayout,
        table: int,
        row_adapter: str | None,
    ) -> PrefixKey:
        """Make the key of a row that uses a table of rope frequencies, and one of the adapters that
        the model's checkpoint holds."""
        return cls(
            source.digest,
            source.adapter,
            str(layout.dtype).removeprefix("mlx.core."),
            layout.kv_bits,
            rope_digest(model, table),
            table,
            row_adapter,
            made_with(),
        )

    @property
    def digest(self) -> str:
        return sha256(json.dumps(asdict(self)).encode()).hexdigest()


def made_with() -> str:
    """Name what computes keys and values; other versions may compute them otherwise."""
    import phimlx

    return f"phimlx {phimlx.__version__} with mlx {version('mlx')} on {backend()}"


def key_of(cache: PromptCache, source: Source, layout: KVLayout) -> PrefixKey:
    """Make the key of what a cache holds, with the source of its own adapter."""
    adapter = cache.kv.adapters[0] if cache.kv.adapters else None
    return PrefixKey.of(cache.model, source, layout, cache.kv.long[0], adapter)


def write_prefix(path: Path, cache: PromptCache, source: Source) -> None:
    """Write a cache to a file that its owner alone may read, as a whole or not at all.

    Args:
        source: of the adapter that the cache's row used.

    Raises:
        CacheError: for an empty cache, or where the file cannot be written.
    """
    kv = cache.kv
    if not kv.length:
        raise CacheError("The cache is empty: nothing has been generated with it.")
    if not cache.kv.rope.serves(kv.long[0], kv.long[0]):
        raise CacheError(
            "The cache cannot be used again: its rope factors follow the length of the sequence."
        )
    layout = KVLayout(cache.model, cache.kv_bits)
    counts = kv.features[0].counts if kv.features else (0, 0)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "key": json.dumps(asdict(key_of(cache, source, layout))),
        "tokens": str(kv.length),
        "media": json.dumps([_item_as_list(item) for item in cache.items]),
        "name": _as_text(source.name),
        "path": _as_text(source.path),
    }
    with translate_write_errors(path, CacheError):
        write_array_file(path, layout.forms(kv.length, counts), arrays_of(kv), metadata)


class PrefixFile:
    """A file of a cache, opened: what it says of itself, in the right form but not yet believed.

    Attributes:
        tokens: how many.
        items: images and sounds among them.
        name, path: of the model, for people.
    """

    def __init__(self, where: Path, file: ArrayFile) -> None:
        self.where, self._file = where, file
        self._metadata = file.metadata
        if self._metadata.get("format") != FORMAT:
            raise CacheError(f"{where} is no file of a prompt cache.")
        if self._metadata.get("version") != VERSION:
            raise CacheError(
                f"{where} is of version {shortened(self._metadata.get('version'))} of prompt "
                f"caches; this is {VERSION}."
            )
        try:
            self.key = _read_key(self._metadata["key"])
            self.items = tuple(_item_of(each) for each in json.loads(self._metadata["media"]))
            self.tokens = int(self._metadata["tokens"])
            self.name, self.path = self._metadata["name"], self._metadata["path"]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CacheError(f"{where} is damaged: what it says of itself is no sense.") from error
        tokens = file.tensors.get(TOKENS)
        if tokens is None or (tokens.shape, tokens.dtype) != ((self.tokens,), "I32"):
            raise CacheError(f"{where} is damaged: its tokens are not there.")

    def read_tokens(self) -> list[int]:
        """Read the tokens alone, which the checksum has not yet confirmed. Raises CacheError."""
        return self._file.read_one(TOKENS).tolist()  # type: ignore[return-value]

    def check(self, key: PrefixKey) -> None:
        """Raise CacheError, which names the first difference, where the key is another."""
        ours, theirs = asdict(key), asdict(self.key)
        for part, value in ours.items():
            if value != theirs[part]:
                words = DIFFERENT.get(part, DIFFERENT["rope"])
                raise CacheError(
                    words.format(path=self.where, ours=value, theirs=theirs[part]),
                    hint=AGAIN,
                )

    def load(self, model: CausalLM, layout: KVLayout, adapter: str | None) -> PromptCache:
        """Read keys and values, given that the key has been checked.

        Args:
            adapter: name of the one that the key tells of, among those that were loaded.

        Raises:
            CacheError: where they are not what this model would hold, or damaged.
        """
        damaged = f"{self.where} is damaged: "
        if not 1 <= self.tokens <= model.config.max_position_embeddings:
            raise CacheError(f"{damaged}the model does not hold {self.tokens} tokens.")
        tokens = np.array(self.read_tokens())
        places = model.placeholders
        text = tokens if places is None else tokens[~np.isin(tokens, places.tokens)]
        if text.size and (text.min() < 0 or text.max() >= model.config.vocab_size):
            raise CacheError(f"{damaged}it has tokens that the model does not have.")
        counts = (0, 0) if places is None else places.count(tokens[None])[0]
        self._check_items(tokens, None if places is None else places.tokens)
        forms = layout.forms(self.tokens, counts)
        found = {
            name: (info.shape, ELEMENT_DTYPES.get(info.dtype))
            for name, info in self._file.tensors.items()
        }
        if found != {name: tuple(form) for name, form in forms.items()}:
            raise CacheError(f"{damaged}its arrays are not those of the model.")
        key, arrays = self.key, dict(self._file.read())
        kv = restore(model, key.kv_bits, arrays, key.table, key.row_adapter, adapter)
        return PromptCache.restored(model, kv, self.items)

    def _check_items(self, tokens: np.ndarray, placeholders: tuple[int, int] | None) -> None:
        """Raise CacheError where media are not those of the placeholders, one after the other."""
        expected = np.full(len(tokens), -1)
        last = 0
        for item in self.items:
            if placeholders is None or not last <= item.begin < min(item.end, len(tokens)):
                raise CacheError(f"{self.where} is damaged: its media are not at their places.")
            expected[item.begin : item.end] = placeholders[item.kind]
            last = item.end
        actual = np.where(np.isin(tokens, placeholders or ()), tokens, -1)
        if (actual != expected).any():
            raise CacheError(f"{self.where} is damaged: its media are not at their places.")


@contextmanager
def open_prefix(path: Path) -> Iterator[PrefixFile]:
    """Open a file of a cache. Raises CacheError, one sentence, where it is none."""
    with open_array_file(path) as file:
        yield PrefixFile(path, file)


def read_prefix(
    path: Path, model: CausalLM, source: Source, adapter: str | None = None
) -> PromptCache:
    """Read a cache from a file that was written with the same model, adapter and versions.

    Args:
        adapter: name of the source's, among those that were loaded.

    Raises:
        CacheError: where it is missing, damaged, or of anything else.
    """
    with open_prefix(path) as file:
        try:
            check_kv_bits(file.key.kv_bits, model.config.head_dim)
        except GenerationError as error:
            raise CacheError(f"{path} holds keys and values at bits that there are not.") from error
        layout = KVLayout(model, file.key.kv_bits)
        table, rope = file.key.table, model.config.rope
        if table not in (rope.table(1), rope.table(model.config.max_position_embeddings)):
            raise CacheError(DIFFERENT["rope"].format(path=path), hint=AGAIN)
        file.check(PrefixKey.of(model, source, layout, table, file.key.row_adapter))
        return file.load(model, layout, adapter)


def _as_text(name: str) -> str:
    """A name of a file as text, which its bytes need not be."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _read_key(text: str) -> PrefixKey:
    """Raises TypeError or ValueError where it is none."""
    values: Any = json.loads(text)
    key = PrefixKey(**values)
    texts = (key.model, key.dtype, key.rope, key.made_with)
    if not all(isinstance(each, str) for each in texts) or type(key.table) is not int:
        raise ValueError(text)
    if key.row_adapter not in (*ADAPTERS, None) or type(key.kv_bits) not in (int, type(None)):
        raise ValueError(text)
    return key


def _item_as_list(item: MediaItem) -> list[Any]:
    return [item.kind, item.digest.hex(), item.begin, item.end, *item.beyond]


def _item_of(values: Any) -> MediaItem:
    """Raises TypeError or ValueError where it is none."""
    kind, digest, begin, end, frames, chunk = values
    numbers = (kind, begin, end, frames)
    if any(type(each) is not int for each in numbers) or kind not in (IMAGE, AUDIO):
        raise ValueError(values)
    return MediaItem(kind, bytes.fromhex(digest), begin, end, (frames, bool(chunk)))
