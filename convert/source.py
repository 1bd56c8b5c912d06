"""What is converted: a model's weights, and the small files that go along with them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.folder import Companions
from convert.request import ConversionRequest
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.gguf.file import GgufCheckpoint
from phimlx.checkpoint.gguf.find import find_gguf
from phimlx.errors import ConversionError, TokenizerError, shortened
from phimlx.hub import model_files
from phimlx.prompt.tokenizer.gguf import ELSEWHERE, find_ends, restore_tokenizer
from phimlx.prompt.tokenizer.tokenizer import Tokenizer

TOKENIZER = "tokenizer.ggml."  # what the settings of a GGUF file begin with
TEMPLATE = "tokenizer.chat_template"
TEMPLATE_NAME = re.compile(r"\w{1,64}")


@dataclass(frozen=True)
class Source:
    """A model that is converted, read as far as its headers.

    Attributes:
        folder: that it lies in.
        companions: tokenizer, template, licence and the like.
    """

    checkpoint: Checkpoint
    folder: Path
    companions: Companions

    @classmethod
    def of(cls, request: ConversionRequest) -> Source:
        """Read what a request names: a folder, a GGUF file, or a folder that holds only that.

        Raises:
            ConfigError, CheckpointError: where it is not a whole model.
            TokenizerError: where its tokenizer cannot be restored, or is another model's.
            ConversionError: for a file that is no GGUF file or small files that cannot be copied.
        """
        path = Path(request.source)
        file = find_gguf(path)
        if file is None:
            checkpoint = Checkpoint(path)
            companions: Companions = model_files.companions(path)
            if request.tokenizer is not None:
                companions = _with_tokenizer(companions, request.tokenizer, checkpoint)
            return cls(checkpoint, path, companions)
        packed = GgufCheckpoint(file, request.dtype)
        if request.tokenizer is None:
            companions = gguf_companions(packed)
        else:
            companions = _with_tokenizer(_generation(packed), request.tokenizer, packed)
        return cls(packed, file.parent, companions)

    @property
    def is_gguf(self) -> bool:
        return isinstance(self.checkpoint, GgufCheckpoint)


def gguf_companions(checkpoint: GgufCheckpoint) -> dict[str, bytes]:
    """Write the tokenizer, the templates and the ends of replies that a GGUF file holds.

    Raises:
        TokenizerError: where the tokenizer cannot be told exactly.
    """
    settings, vocab_size = checkpoint.settings, checkpoint.config["vocab_size"]
    restored = restore_tokenizer(_tokenizer_values(settings), vocab_size, checkpoint.text_split)
    described = {
        **restored.settings,
        "model_max_length": checkpoint.config["max_position_embeddings"],
    }
    templates = _templates(settings)
    if templates:
        described["chat_template"] = templates
    return {
        "tokenizer.json": _json(restored.tokenizer),
        "tokenizer_config.json": _json(described),
        **_generation(checkpoint),
    }


def _generation(checkpoint: GgufCheckpoint) -> dict[str, bytes]:
    values = _tokenizer_values(checkpoint.settings)
    ids = {
        name: values.get(f"{key}_token_id") for name, key in (("bos", "bos"), ("pad", "padding"))
    }
    written: dict[str, Any] = {
        f"{name}_token_id": number for name, number in ids.items() if type(number) is int
    }
    ends = find_ends(values)
    if ends:
        written["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return {"generation_config.json": _json(written)} if written else {}


def _tokenizer_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key.removeprefix(TOKENIZER): value
        for key, value in settings.items()
        if key.startswith(TOKENIZER)
    }


def _templates(settings: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """The chat template, or several by name, as tokenizer_config.json has them."""
    found = {
        key.removeprefix(TEMPLATE).lstrip(".") or "default": value
        for key, value in settings.items()
        if key == TEMPLATE or key.startswith(f"{TEMPLATE}.")
    }
    for name, text in found.items():
        if not isinstance(text, str) or not TEMPLATE_NAME.fullmatch(name):
            raise TokenizerError(
                f"The file has a chat template {shortened(name)} that is not text.", hint=ELSEWHERE
            )
    if not found.keys() - {"default"}:
        return found.get("default")
    return [{"name": name, "template": text} for name, text in found.items()]


def _json(value: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            "The file has a template or token that is not UTF-8 text.", hint=ELSEWHERE
        ) from error


def _with_tokenizer(
    companions: Companions, folder: str | Path, checkpoint: Checkpoint
) -> dict[str, Path | bytes]:
    """Small files with the tokenizer of another folder in place of their own.

    Raises:
        TokenizerError: where it has tokens that the model has not, or others in their places.
    """
    folder = Path(folder)
    tokenizer = Tokenizer.load(folder)
    size = checkpoint.config["vocab_size"]
    if tokenizer.vocab_size > size:
        raise TokenizerError(
            f"The tokenizer of {folder} has {tokenizer.vocab_size} tokens, and the model {size}.",
            hint="Give the folder of the model's own tokenizer.",
        )
    if isinstance(checkpoint, GgufCheckpoint):
        _check_tokens(tokenizer, folder, _tokenizer_values(checkpoint.settings))
    own = {name: each for name, each in companions.items() if name not in model_files.TOKENIZER}
    others = model_files.companions(folder)
    return own | {name: each for name, each in others.items() if name in model_files.TOKENIZER}


def _check_tokens(tokenizer: Tokenizer, folder: Path, values: Mapping[str, Any]) -> None:
    """Refuse a tokenizer whose control tokens are not where the file has them."""
    tokens = values.get("tokens")
    if not isinstance(tokens, list):
        return
    places = {token: number for number, token in enumerate(tokens)}
    for token, number in tokenizer.control_tokens.items():
        if places.get(token, number) != number:
            raise TokenizerError(
                f"The tokenizer of {folder} is another model's: its {shortened(token)} is "
                f"{number}, and the file's is {places[token]}.",
                hint="Give the folder of the model's own tokenizer.",
            )


def refuse_gguf(source: Source, what: str) -> None:
    """Raise ConversionError for a GGUF file where `what` needs a model's folder."""
    if source.is_gguf:
        raise ConversionError(
            f"{what} reads a model's folder, and {source.checkpoint.folder} is a GGUF file.",
            hint="Convert it to a folder first, without -q, and then that folder.",
        )
