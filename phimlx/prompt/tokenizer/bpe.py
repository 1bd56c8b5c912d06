"""Byte-level BPE: ordinary text to token ids, and a token id to its bytes.

Knows nothing of control tokens; they are found in the text before it comes here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from phimlx.errors import TokenizerError
from phimlx.prompt.tokenizer.added_tokens import AddedToken

if TYPE_CHECKING:
    import tokenizers


class Vocabulary(Protocol):
    """A source of byte-level BPE."""

    @property
    def size(self) -> int:
        """How many token ids there are."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text."""

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
    """The BPE of a `tokenizer.json`, run by the `tokenizers` library.

    The file is parsed once. A second tokenizer shares the parsed model and holds no added tokens,
    so that text which spells a control token stays text.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        from tokenizers import Tokenizer

        self._plain = Tokenizer(tokenizer.model)
        # The library answers with an error where such a part is absent.
        for part in ("normalizer", "pre_tokenizer"):
            value = getattr(tokenizer, part)
            if value is not None:
                setattr(self._plain, part, value)
        self._alphabet = byte_alphabet()
        self.size: int = self._plain.get_vocab_size()

    @classmethod
    def load(cls, path: Path) -> tuple[LibraryVocabulary, list[AddedToken]]:
        """The vocabulary of a `tokenizer.json`, and the tokens added to it.

        Raises TokenizerError where the file is damaged or is not byte-level BPE.
        """
        from tokenizers import Tokenizer, decoders, models

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except MemoryError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(
                f"{path} is damaged: {error}.", hint="Download the model again."
            ) from error
        byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        if not (byte_level and isinstance(tokenizer.model, models.BPE)):
            raise TokenizerError(
                f"{path} is not a byte-level BPE tokenizer, the only kind in the Phi-4 family.",
                hint="Check that the folder holds a Phi-4 model.",
            )
        added = [
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
        return cls(tokenizer), added

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: int) -> bytes:
        spelled = self._plain.id_to_token(token)
        if spelled is None:
            return b""
        try:
            return bytes([self._alphabet[character] for character in spelled])
        except KeyError:  # not spelled in the alphabet: stands for itself, as in the library
            return spelled.encode()
