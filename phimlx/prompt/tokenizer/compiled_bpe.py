"""Compiles a vocabulary to a file that opens at once, where tokenizer.json takes long to parse.

The `tokenizers` library makes it, checks it and takes long texts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import struct
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.errors import TokenizerError
from phimlx.files import MAX_BYTES, reason, replacing
from phimlx.folders import cache_folder as own_cache_folder
from phimlx.prompt.tokenizer.added_tokens import AddedToken
from phimlx.prompt.tokenizer.bpe import LibraryVocabulary, Vocabulary, byte_alphabet
from phimlx.prompt.tokenizer.description import HINT
from phimlx.sizes import size_text

if TYPE_CHECKING:
    import tokenizers

FORMAT = 1  # to be raised with every change to the layout below or to what the file must hold
MAGIC = b"phimlxbp"
# Magic, format, CRC-32 of all that follows the header, number of sections; then 8 bytes for the
# length of each section. Sections are padded to 8 bytes. Numbers are in the machine's own order:
# the file never leaves it.
HEADER = struct.Struct("=8sIII")
LENGTH = struct.Struct("=Q")
SECTIONS = ("about", "bytes", "offsets", "starts", "rights", "ranks", "merged")

MIN_SOURCE = 2**20  # bytes of tokenizer.json; smaller ones parse fast enough
MAX_TEXT = 50_000  # characters; longer texts are left to the library
MAX_WORD = 400
# What a BPE model may ask for beyond merging, and this module does not do.
OPTIONS = (
    *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"),
    *("byte_fallback", "ignore_merges"),
)
NEVER = 2**32  # the rank of a pair that does not merge


def cache_folder() -> Path:
    """Folder of the compiled vocabularies."""
    return own_cache_folder() / "vocabularies"


def load_vocabulary(path: Path) -> tuple[Vocabulary, list[AddedToken]]:
    """The vocabulary and added tokens of a tokenizer.json, from its compiled form if there is one.

    Where there is none it is made on the way, and checked against `tokenizers`. A cache that cannot
    be written is told to the log, once; it and a vocabulary of another kind cost the time to load.
    Raises TokenizerError as `LibraryVocabulary.load` does.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise TokenizerError(f"{path} is larger than {size_text(MAX_BYTES)}.", hint=HINT)
    if size < MIN_SOURCE:
        return LibraryVocabulary.load(path)
    file = cache_folder() / f"{_digest(path)}.{FORMAT}"
    sections = _open(file)
    if sections is not None and sections["about"]:
        vocabulary = CompiledVocabulary(sections, path)
        return vocabulary, vocabulary.added
    library, added = LibraryVocabulary.load(path)
    if sections is None:
        _write(file, lambda: _compile(path, library, added))
    return library, added


class CompiledVocabulary:
    """Byte-level BPE over a mapped file.

    Merges are kept by their left token: those of token `t` are `rights[starts[t]:starts[t + 1]]`,
    sorted, with their ranks and results beside them.
    """

    sentencepiece = False
    drops_space = False

    def __init__(self, sections: dict[str, memoryview], path: Path) -> None:
        """`path`: the tokenizer.json that long texts are left to."""
        about = json.loads(bytes(sections["about"]))
        self.added = [AddedToken(**token) for token in about["added"]]
        self._path = path
        self._pre_tokenizer = _pre_tokenizer(about["pre_tokenizer"])
        self._initial: dict[str, int] = dict(zip(byte_alphabet(), about["initial"], strict=True))
        self._bytes = sections["bytes"]
        self._offsets, self._starts, self._rights, self._ranks, self._merged = (
            sections[name].cast("I") for name in SECTIONS[2:]
        )
        self.size: int = len(self._offsets) - 1
        # A chat says the same words over and over.
        self._encode_word = lru_cache(maxsize=16_384)(self._merge)

    def encode(self, text: str, at_start: bool = True) -> list[int]:
        if len(text) > MAX_TEXT or "_library" in self.__dict__:
            return self._library.encode(text)
        words = [word for word, _ in self._pre_tokenizer.pre_tokenize_str(text)]
        if any(len(word) > MAX_WORD for word in words):  # time grows with the square of a word
            return self._library.encode(text)
        return [token for word in words for token in self._encode_word(word)]

    def token_bytes(self, token: int) -> bytes:
        return bytes(self._bytes[self._offsets[token] : self._offsets[token + 1]])

    @cached_property
    def _library(self) -> LibraryVocabulary:
        return LibraryVocabulary.load(self._path)[0]

    def _merge(self, word: str) -> tuple[int, ...]:
        """Token ids of one word: the pair of lowest rank merges first, the leftmost of equals."""
        ids = [self._initial[character] for character in word]
        found = [self._find(left, right) for left, right in pairwise(ids)]
        ranks = [self._ranks[place] if place >= 0 else NEVER for place in found]
        while ranks and (rank := min(ranks)) != NEVER:
            index = ranks.index(rank)
            ids[index : index + 2] = [self._merged[found[index]]]
            del found[index], ranks[index]
            for changed in (index - 1, index):
                if 0 <= changed < len(ranks):
                    place = found[changed] = self._find(ids[changed], ids[changed + 1])
                    ranks[changed] = self._ranks[place] if place >= 0 else NEVER
        return tuple(ids)

    def _find(self, left: int, right: int) -> int:
        """Place of the merge of the pair, or -1."""
        end = self._starts[left + 1]
        place = bisect_left(self._rights, right, self._starts[left], end)
        return place if place < end and self._rights[place] == right else -1


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pre_tokenizer(description: Any) -> tokenizers.pre_tokenizers.PreTokenizer:
    """The library's pre-tokenizer of this description, without a vocabulary around it."""
    from tokenizers import Tokenizer

    parts: dict[str, Any] = dict.fromkeys(
        ("truncation", "padding", "normalizer", "post_processor", "decoder")
    )
    model = {"type": "BPE", "vocab": {}, "merges": []}
    return Tokenizer.from_str(
        json.dumps(
            {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": description}
            | parts
        )
    ).pre_tokenizer


def _open(file: Path) -> dict[str, memoryview] | None:
    """The sections of a compiled file; None where it is absent or damaged."""
    try:
        with file.open("rb") as handle:
            view = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError):  # absent or unreadable; empty
        return None
    start = HEADER.size + LENGTH.size * len(SECTIONS)
    if len(view) < start or HEADER.unpack_from(view) != (
        *(MAGIC, FORMAT, zlib.crc32(view[HEADER.size :]), len(SECTIONS)),
    ):
        return None
    sections = {}
    for index, name in enumerate(SECTIONS):
        (length,) = LENGTH.unpack_from(view, HEADER.size + LENGTH.size * index)
        sections[name] = view[start : start + length]
        start += -(-length // 8) * 8
    return sections


def _write(file: Path, make: Callable[[], Sequence[bytes]]) -> None:
    """Writes what `make` makes, whole or not at all; calls it only where writing is possible."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            made = make()
            padded = b"".join(part + bytes(-len(part) % 8) for part in made)
            body = b"".join(LENGTH.pack(len(part)) for part in made) + padded
            header = HEADER.pack(MAGIC, FORMAT, zlib.crc32(body), len(made))
            temporary.write_bytes(header + body)
    except OSError as error:  # a cache on a full or read-only disk is done without
        _log_unwritable(file.parent, reason(error))


@cache
def _log_unwritable(folder: Path, why: str) -> None:
    """Say once that tokenizers will go on taking long to load."""
    logging.getLogger("phimlx").warning(
        "The compiled vocabulary cannot be kept in %s (%s), so that loading a tokenizer takes "
        "longer each time.",
        folder,
        why,
    )


def _compile(path: Path, library: LibraryVocabulary, added: list[AddedToken]) -> list[bytes]:
    """The sections for a tokenizer.json; all empty where it is not what a compiled one can do."""
    unfit = [b""] * len(SECTIONS)
    parsed = json.loads(path.read_bytes())
    model, vocabulary = parsed["model"], parsed["model"]["vocab"]
    if sorted(vocabulary.values()) != list(range(library.size)):
        return unfit
    known = parsed.get("normalizer") is None and parsed.get("pre_tokenizer") is not None
    if not known or any(model.get(option) for option in OPTIONS):
        return unfit
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    try:
        initial = [vocabulary[character] for character in byte_alphabet()]
        merges = sorted(
            (vocabulary[left], vocabulary[right], rank, vocabulary[left + right])
            for rank, (left, right) in enumerate(pairs)
        )
    except (KeyError, ValueError):
        return unfit
    pieces = [library.token_bytes(token) for token in range(library.size)]
    offsets, starts = array("I", [0]), array("I", [0])
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    place = 0
    for token in range(library.size):
        while place < len(merges) and merges[place][0] == token:
            place += 1
        starts.append(place)
    about = {
        "added": [asdict(token) for token in added],
        "initial": initial,
        "pre_tokenizer": parsed["pre_tokenizer"],
    }
    columns = [array("I", [merge[column] for merge in merges]) for column in (1, 2, 3)]
    made = [
        json.dumps(about).encode(),
        b"".join(pieces),
        *(numbers.tobytes() for numbers in (offsets, starts, *columns)),
    ]
    views = [memoryview(part) for part in made]
    compiled = CompiledVocabulary(dict(zip(SECTIONS, views, strict=True)), path)
    agree = all(compiled.encode(text) == library.encode(text) for text in _battery(pieces))
    return made if agree else unfit


def _battery(pieces: list[bytes]) -> list[str]:
    """Texts to compare two vocabularies by: each token that is text, and many side by side."""
    words = [text for piece in pieces if "\ufffd" not in (text := piece.decode(errors="replace"))]
    spread = words[:: max(1, len(words) // 4000)]
    mixed = ["".join(spread[start : start + 40]) for start in range(0, len(spread), 40)]
    spaced = [" ".join(words[start::997][:200]) for start in range(40)]
    return [*spread, *mixed, *spaced, *EVERYDAY]


EVERYDAY = (
    "The quick brown fox jumps over the lazy dog. It's 3,141.59 o'clock; WE'LL see!\r\n\r\n",
    "def f(x: int) -> str:\n\t\treturn f'{x ** 2:>10}'  # \\n {}[]()<>/|\n\n\n        pass\n",
    "Größe, naïve, Ελληνικά, Привет мир, שלום עולם, مرحبا بالعالم, नमस्ते दुनिया, สวัสดี",
    "日本語の文章。中文句子，标点！ 한국어 문장? 👩‍👩‍👧‍👦 🏳️‍🌈 é é \u200b\ufeff\u2028\x00\x1b\x7f",
    " \t \n  \r\n   \u3000\xa0 " * 9,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 000000000000000000000000000000000000 -----------------",
)
