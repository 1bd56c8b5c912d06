"""Byte-pair encoding by the `tokenizers` library: ordinary text to token ids, and ids to bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from phimlx.errors import TokenizerError
from phimlx.files import read_json
from phimlx.prompt.tokenizer.added_tokens import AddedToken
from phimlx.prompt.tokenizer.description import HINT, read_description

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"  # SentencePiece's spelling of a space
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# The decoder of SentencePiece's BPE, which may drop the first space of a text.
REPLACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
SENTENCEPIECE = [REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


class Vocabulary(Protocol):
    """A vocabulary of byte-pair encoding.

    Attributes:
        sentencepiece: whether bytes that are no UTF-8 become U+FFFD one by one, as SentencePiece
            has it, or a broken character at a time.
        drops_space: whether a text that is decoded loses one space at its beginning, which
            encoding put there.
    """

    sentencepiece: bool
    drops_space: bool

    @property
    def size(self) -> int:
        """Number of token ids."""

    def encode(self, text: str, at_start: bool = True) -> list[int]:
        """Token ids of ordinary text; `at_start` where nothing stands before it."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for; empty for an id that has none."""


def byte_alphabet() -> dict[str, int]:
    """GPT-2's table of printable characters that stand for the 256 bytes, read backwards.

    Source: openai/gpt-2 `src/encoder.py`, `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


class LibraryVocabulary:
    """Byte-level BPE, as GPT-2 has it.

    A second tokenizer shares the model of the one that was read and holds no added tokens, so that
    text which spells a control token stays text.
    """

    sentencepiece = False
    drops_space = False

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._plain = _without_added_tokens(tokenizer)
        self._alphabet = byte_alphabet()
        self.size: int = 1 + max(self._plain.get_vocab().values(), default=-1)

    @staticmethod
    def load(path: Path) -> tuple[LibraryVocabulary, list[AddedToken]]:
        """Load the vocabulary of a `tokenizer.json`, and the tokens added to it.

        Raises TokenizerError where the file is damaged or holds another kind of tokenizer.
        """
        from tokenizers import Tokenizer, decoders, models

        text = json.dumps(read_description(path), ensure_ascii=False)
        tokenizer = _read(path, lambda: Tokenizer.from_str(text))
        is_bpe = isinstance(tokenizer.model, models.BPE)
        if is_bpe and isinstance(tokenizer.decoder, decoders.ByteLevel):
            return LibraryVocabulary(tokenizer), _added_tokens(tokenizer)
        steps = _describe(tokenizer.decoder).get("decoders")
        if is_bpe and steps in (SENTENCEPIECE, [*SENTENCEPIECE, STRIP]):
            added = _added_tokens(tokenizer)
            return SentencePieceVocabulary(tokenizer, STRIP in steps, added), added
        raise TokenizerError(
            f"{path} is neither a byte-level BPE tokenizer nor SentencePiece's, the only kinds in "
            "the Phi family.",
            hint="Check that the folder holds a Phi model.",
        )

    @staticmethod
    def load_merges(folder: Path) -> tuple[LibraryVocabulary, list[AddedToken]]:
        """Load GPT-2's form: `vocab.json`, `merges.txt` and, where it is there, added_tokens.json.

        Special tokens that tokenizer_config.json names are added tokens too.
        Raises TokenizerError where a file is missing or damaged.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        model = _read(merges, lambda: models.BPE.from_file(str(vocab), str(merges)))
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        ids = read_json(folder / "added_tokens.json", TokenizerError, hint=HINT, missing_ok=True)
        settings = read_json(
            folder / "tokenizer_config.json", TokenizerError, hint=HINT, missing_ok=True
        )
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            content = settings.get(name)
            content = content.get("content") if isinstance(content, dict) else content
            if isinstance(content, str) and (known := tokenizer.token_to_id(content)) is not None:
                ids.setdefault(content, known)
        if any(type(token) is not int for token in ids.values()):
            raise TokenizerError(
                f"{folder / 'added_tokens.json'} is not a table of tokens.", hint=HINT
            )
        return LibraryVocabulary(tokenizer), [AddedToken(ids[text], text) for text in ids]

    def encode(self, text: str, at_start: bool = True) -> list[int]:
        return _encode(self._plain, text)

    def token_bytes(self, token: int) -> bytes:
        spelled = self._plain.id_to_token(token)
        if spelled is None:
            return b""
        try:
            return bytes([self._alphabet[character] for character in spelled])
        except KeyError:  # not spelled in the alphabet: stands for itself, as in the library
            return spelled.encode()


class SentencePieceVocabulary(LibraryVocabulary):
    """SentencePiece's BPE, as Llama 2 and Phi-3 have it: spaces spelled U+2581, bytes `<0x0A>`."""

    sentencepiece = True

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, drops_space: bool, added: list[AddedToken]
    ) -> None:
        from tokenizers import pre_tokenizers

        super().__init__(tokenizer)
        self.drops_space = drops_space
        spelled = {token.content for token in added if self._spells(token)}
        if spelled:
            self._plain.model = _without_merges(tokenizer.model, spelled)
        # A space in front of the first word alone, or in front of each stretch of text.
        self._later = self._plain
        form = _describe(tokenizer.pre_tokenizer)
        if form.get("type") == "Metaspace" and form.get("prepend_scheme") == "first":
            self._later = _without_added_tokens(self._plain)
            self._later.pre_tokenizer = pre_tokenizers.Metaspace(
                replacement=form["replacement"], prepend_scheme="never", split=form["split"]
            )

    def encode(self, text: str, at_start: bool = True) -> list[int]:
        return _encode(self._plain if at_start else self._later, text)

    def token_bytes(self, token: int) -> bytes:
        spelled = self._plain.id_to_token(token)
        if spelled is None:
            return b""
        byte = BYTE.fullmatch(spelled)
        return bytes.fromhex(byte[1]) if byte else spelled.replace(SPACE, " ").encode()

    def _spells(self, token: AddedToken) -> bool:
        """Tell whether ordinary text that reads like an added token would become it."""
        return token.id in self._plain.encode(token.content, add_special_tokens=False).ids


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic is no Exception
        raise TokenizerError(
            f"The tokenizers library fails on a text: {error!s:.300}.",
            hint="Get the tokenizer files that belong to the model into its folder.",
        ) from error


def _read(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and panics
        raise TokenizerError(f"{path} is damaged: {error!s:.300}.", hint=HINT) from error


def _added_tokens(tokenizer: tokenizers.Tokenizer) -> list[AddedToken]:
    return [
        AddedToken(
            id=token_id,
            content=token.content,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            single_word=token.single_word,
            normalized=token.normalized,
        )
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
    ]


def _without_added_tokens(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    plain = Tokenizer(tokenizer.model)
    # The library answers with an error where such a part is absent.
    for part in ("normalizer", "pre_tokenizer"):
        value = getattr(tokenizer, part)
        if value is not None:
            setattr(plain, part, value)
    return plain


def _without_merges(model: Any, contents: set[str]) -> tokenizers.models.BPE:
    """The model without the merges that make one of `contents` of ordinary text."""
    from tokenizers import models

    form = _describe(model)
    merges = (pair.split(" ") if isinstance(pair, str) else pair for pair in form["merges"])
    return models.BPE(
        vocab=form["vocab"],
        merges=[(left, right) for left, right in merges if left + right not in contents],
        unk_token=form["unk_token"],
        fuse_unk=form["fuse_unk"],
        byte_fallback=form["byte_fallback"],
        ignore_merges=form.get("ignore_merges", False),
    )


def _describe(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as tokenizer.json has it; empty where there is none."""
    return {} if part is None else dict(json.loads(part.__getstate__()))
