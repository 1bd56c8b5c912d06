"""Turns text into token ids and back, with control tokens only where the caller asks for them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from phimlx.errors import TokenizerError
from phimlx.files import read_json
from phimlx.prompt.tokenizer.added_tokens import AddedToken, AddedTokens
from phimlx.prompt.tokenizer.bpe import LibraryVocabulary, Vocabulary
from phimlx.prompt.tokenizer.compiled_bpe import load_vocabulary
from phimlx.prompt.tokenizer.description import check_ids

MAX_TOKEN = 1024  # characters; published added tokens have at most 31

_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8, as "surrogateescape" has them


class Detokenizer:
    """Renders a stream of token ids as text, chunk by chunk.

    Characters whose bytes are spread over several tokens appear when they are complete. Bytes that
    are no UTF-8 become U+FFFD, as in `bytes.decode(errors="replace")`; with SentencePiece, each
    byte one, as in its own decoder.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        skip: Collection[int] = (),
        *,
        sentencepiece: bool = False,
        drops_space: bool = False,
    ) -> None:
        self._token_bytes = token_bytes
        self._skip = frozenset(skip)
        errors = "surrogateescape" if sentencepiece else "replace"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._drops_space = drops_space

    def add(self, token: int) -> str:
        """The text that `token` completes."""
        if token in self._skip:
            return ""
        return self._read(self._token_bytes(token))

    def finish(self) -> str:
        """The text of a character that was never completed."""
        return self._read(b"", final=True)

    def whole(self, ids: Iterable[int]) -> str:
        """The text of all tokens at once."""
        return self._read(
            b"".join(self._token_bytes(token) for token in ids if token not in self._skip),
            final=True,
        )

    def _read(self, data: bytes, final: bool = False) -> str:
        text = _ESCAPED.sub("\ufffd", self._decoder.decode(data, final))
        if text and self._drops_space:
            self._drops_space = False
            return text.removeprefix(" ")
        return text


class Tokenizer:
    """A vocabulary of byte-pair encoding with the tokens added to it."""

    def __init__(self, vocabulary: Vocabulary, added: Iterable[AddedToken]) -> None:
        by_id = {token.id: token for token in added}
        self._added = tuple(by_id.values())
        control = [token for token in by_id.values() if not token.is_blank]
        self._vocabulary = vocabulary
        self._control = AddedTokens(control)
        self._blank = AddedTokens(token for token in by_id.values() if token.is_blank)
        self._bytes = {token.id: token.content.encode() for token in by_id.values()}
        self.vocab_size: int = max(vocabulary.size, *(token_id + 1 for token_id in by_id), 0)
        self.control_tokens: Mapping[str, int] = MappingProxyType(
            {token.content: token.id for token in sorted(control, key=lambda token: token.id)}
        )

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Load the tokenizer of a model folder, amended by `tokenizer_config.json`.

        It is `tokenizer.json`, or else `vocab.json` and `merges.txt`. An `added_tokens_decoder` in
        tokenizer_config.json overrides the added tokens, id by id.
        Raises TokenizerError where a file is missing or damaged.
        """
        path = folder / "tokenizer.json"
        if not has_tokenizer(folder):
            raise TokenizerError(
                f"There is no tokenizer.json in {folder}.",
                hint="Text needs a tokenizer: get the model's tokenizer files into that folder.",
            )
        overrides = _configured_tokens(folder / "tokenizer_config.json")
        if path.is_file():
            vocabulary, added = load_vocabulary(path)
        else:
            vocabulary, added = LibraryVocabulary.load_merges(folder)
        for token in (*added, *overrides):
            if len(token.content) > MAX_TOKEN:
                raise TokenizerError(
                    f"The tokenizer in {folder} has an added token of {len(token.content)} "
                    f"characters; at most {MAX_TOKEN} are read.",
                    hint="Download the model again.",
                )
        found = cls(vocabulary, [*added, *overrides])
        check_ids(folder, found.vocab_size - 1)
        return found

    def extended(self, tokens: Mapping[str, int]) -> Tokenizer:
        """The same one with control tokens more, by name, which may be none of the vocabulary."""
        more = (AddedToken(token, name) for name, token in tokens.items())
        return Tokenizer(self._vocabulary, (*self._added, *more))

    def encode(self, text: str, control: bool = False, at_start: bool = True) -> list[int]:
        """Token ids of `text`; `at_start` where nothing stands before it.

        With `control` false every character is ordinary text: no control token comes out, whatever
        the text spells. With `control` true control tokens are recognised, and swallow the white
        space around them, as in the reference. Lone surrogates are read as U+FFFD.
        """
        text = _well_formed(text)
        ids: list[int] = []
        for piece in self.split(text) if control else [text]:
            ids += [piece] if isinstance(piece, int) else self._encode_plain(piece, at_start)
            at_start = False
        return ids

    def split(self, text: str) -> Iterator[int | str]:
        """The control tokens that `text` spells, as ids, and the stretches of text between them."""
        return self._control.split(text)

    def split_with_ends(self, text: str, start: int = 0) -> Iterator[tuple[int | str, int]]:
        """The same from `start` on, where a piece ends, and after each piece where it ends."""
        return self._control.split_with_ends(text, start)

    def decode(self, ids: Iterable[int], skip: Collection[int] = ()) -> str:
        """The text of `ids`, control tokens as their names, without those in `skip`.

        Ids beyond the vocabulary (padding rows of the embedding) render as nothing.
        """
        return self.detokenizer(skip).whole(ids)

    def detokenizer(self, skip: Collection[int] = (), at_start: bool = True) -> Detokenizer:
        """A decoder for ids that arrive one at a time; `at_start` where no text is before them."""
        vocabulary = self._vocabulary
        return Detokenizer(
            self.token_bytes,
            skip,
            sentencepiece=vocabulary.sentencepiece,
            drops_space=vocabulary.drops_space and at_start,
        )

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for; empty for an id that has none."""
        known = self._bytes.get(token)
        if known is None:
            inside = 0 <= token < self._vocabulary.size
            known = self._bytes[token] = self._vocabulary.token_bytes(token) if inside else b""
        return known

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        ids: list[int] = []
        for index, piece in enumerate(self._blank.split(text)):
            if isinstance(piece, int):
                ids.append(piece)
            elif piece:
                ids += self._vocabulary.encode(piece, at_start and index == 0)
        return ids


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a model folder holds the files of a tokenizer."""
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def _well_formed(text: str) -> str:
    """`text` with U+FFFD for surrogates, which UTF-8, and so a byte-level vocabulary, lacks."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _configured_tokens(path: Path) -> list[AddedToken]:
    settings = read_json(path, TokenizerError, hint="Download the model again.", missing_ok=True)
    listed = settings.get("added_tokens_decoder", {})
    try:
        for token_id in listed:
            if not re.fullmatch(r"[0-9]{1,8}", token_id):
                raise ValueError(token_id)
        return [
            AddedToken(
                id=int(token_id),
                content=str(entry["content"]),
                **{
                    flag: bool(entry.get(flag, False))
                    for flag in ("lstrip", "rstrip", "single_word", "normalized")
                },
            )
            for token_id, entry in listed.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{path} has an added_tokens_decoder that is not a table of tokens.",
            hint="Download the model again.",
        ) from error
