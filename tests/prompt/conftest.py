"""Tokenizers and templates for the prompt tests: the real ones, and tiny ones made here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from phimlx.prompt.chat_template import ChatTemplate
from phimlx.prompt.tokenizer import compiled_bpe as compiled
from phimlx.prompt.tokenizer.bpe import byte_alphabet
from phimlx.prompt.tokenizer.tokenizer import Tokenizer

MINI_TOKENS = (
    "<|endoftext|>",
    "<|assistant|>",
    "<|end|>",
    "<|user|>",
    "<|system|>",
    "<|tool|>",
    "<|/tool|>",
    "<|tool_call|>",
    "<|/tool_call|>",
    "<|endoftext10|>",
    "<think>",
    "</think>",
)


def tiny_tokenizer_json(tokens: Sequence[str | dict[str, Any]] = MINI_TOKENS) -> dict[str, Any]:
    """A tokenizer.json whose ordinary tokens are the 256 bytes, by value, "he" and "the"."""
    vocabulary = dict(byte_alphabet())
    vocabulary |= {"he": 256, "the": 257}
    added = [
        {
            "id": 258 + index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": True,
            "normalized": False,
            "special": True,
        }
        if isinstance(token, str)
        else {"id": 258 + index, "single_word": False, "special": True} | token
        for index, token in enumerate(tokens)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [["h", "e"], ["t", "he"]],
        },
    }


Make = Callable[..., Path]


def spelled(template: ChatTemplate, *arguments: Any, **options: Any) -> str:
    """The tokens of a prompt as text, control tokens by their names."""
    return template._tokenizer.decode(template.encode(*arguments, **options))


@pytest.fixture
def make_folder(tmp_path: Path) -> Make:
    """Makes a model folder with a tiny tokenizer."""

    def make(
        tokens: Sequence[str | dict[str, Any]] = MINI_TOKENS,
        config: Any = None,
        template: str | None = None,
    ) -> Path:
        (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json(tokens)))
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        return tmp_path

    return make


@pytest.fixture
def tiny(make_folder: Make) -> Tokenizer:
    return Tokenizer.load(make_folder())


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of compiled vocabularies for the tests alone."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "cache_folder", lambda: folder)
        yield folder


@pytest.fixture(scope="session")
def models(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Tokenizer, ChatTemplate]]:
    """The real tokenizers and templates, by model. Folders without a tokenizer get their kin's."""
    for name in ("phi-4", "Phi-4-mini-instruct", "Phi-4-multimodal-instruct"):
        compiled.load_vocabulary(data / "hf" / name / "tokenizer.json")
    loaded = {}
    for model, name, kin in (
        ("phi-4", "phi-4", "phi-4"),
        ("phi-4-mini", "Phi-4-mini-instruct", "Phi-4-mini-instruct"),
        ("phi-4-multimodal", "Phi-4-multimodal-instruct", "Phi-4-multimodal-instruct"),
        ("phi-4-mini-reasoning", "Phi-4-mini-reasoning", "Phi-4-mini-instruct"),
        ("phi-4-reasoning", "Phi-4-reasoning", "phi-4"),
        ("phi-4-reasoning-vision", "Phi-4-reasoning-vision-15B", "phi-4"),
    ):
        folder = tmp_path_factory.mktemp("models") / name
        folder.mkdir()
        for file in (*(data / "hf" / kin).glob("tokenizer.json"), *(data / "hf" / name).iterdir()):
            shutil.copyfile(file, folder / file.name)
        tokenizer = Tokenizer.load(folder)
        loaded[model] = tokenizer, ChatTemplate.load(folder, tokenizer)
    return loaded
