"""Tokenizers out of GGUF files: the ids of the published ones, and of sentencepiece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.export.gguf import read_vocabulary
from phimlx.errors import TokenizerError
from phimlx.prompt.tokenizer import gguf as module
from phimlx.prompt.tokenizer.gguf import ELSEWHERE, find_ends, restore_tokenizer
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from tests.prompt.tokenizer.test_tokenizer import mixed_texts, varied_texts

tokenizers = pytest.importorskip("tokenizers")
GOLDENS = Path(__file__).parents[2] / "goldens" / "gguf"


def written(folder: Path, values: dict[str, Any], vocab_size: int, **keywords: Any) -> Tokenizer:
    restored = restore_tokenizer(values, vocab_size, **keywords)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(restored.tokenizer), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(restored.settings), "utf-8")
    return Tokenizer.load(folder)


def values_of(folder: Path, vocab_size: int) -> dict[str, Any]:
    """What llama.cpp's converter says of a published tokenizer."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'phimlx[gguf]'")
    tokens, types, split = read_vocabulary(folder, vocab_size)
    merges = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    special = gguf.SpecialVocab(folder, n_vocab=vocab_size)
    names = {"unk": "unknown", "pad": "padding"}
    return {
        "model": "gpt2",
        "pre": split,
        "tokens": tokens,
        "token_type": np.array(types),
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
        **{
            f"{names.get(name, name)}_token_id": number
            for name, number in special.special_token_ids.items()
        },
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "vocab_size"),
    [("phi-4", 100352), ("Phi-4-mini-instruct", 200064), ("phi-1_5", 51200)],
)
def test_published_tokenizers_come_back(
    data: Path, tmp_path: Path, name: str, vocab_size: int
) -> None:
    """Down to the white space that control tokens swallow, which the file does not say."""
    published = data / "hf" / name
    ours = written(tmp_path, values_of(published, vocab_size), vocab_size)
    reference = Tokenizer.load(published)
    assert ours.vocab_size == reference.vocab_size
    assert ours.control_tokens == reference.control_tokens
    texts = [*varied_texts(), *mixed_texts(list(reference.control_tokens)[:40])]
    for text in texts:
        for control in (True, False):
            expected = reference.encode(text, control=control)
            assert ours.encode(text, control=control) == expected, ascii(text)
            assert ours.decode(expected) == reference.decode(expected)
    added = json.loads((published / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    restored = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    assert restored == sorted(added, key=lambda token: token["id"])
    settings = json.loads((published / "tokenizer_config.json").read_text("utf-8"))
    for token in ("bos_token", "eos_token"):
        found = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))[token]
        assert found == settings[token]


def sentencepiece_values() -> dict[str, Any]:
    golden = json.loads((GOLDENS / "sentencepiece.json").read_text("utf-8"))
    return {
        "model": "llama",
        "pre": "default",
        "tokens": golden["tokens"],
        "scores": np.array(golden["scores"], np.float32),
        "token_type": np.array(golden["types"], np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "texts": golden["texts"],
        "ids": golden["ids"],
    }


def test_ids_are_sentencepieces(tmp_path: Path) -> None:
    values = sentencepiece_values()
    ours = written(tmp_path, values, 907)
    assert len(values["texts"]) > 20
    for text, ids in zip(values["texts"], values["ids"], strict=True):
        assert ours.encode(text) == ids, ascii(text)
        assert ours.decode(ids) == text.replace("▁", " ")  # as sentencepiece has it


def test_control_tokens_of_phi3(tmp_path: Path) -> None:
    """They swallow what follows, and a space is put in front of what comes then."""
    ours = written(tmp_path, sentencepiece_values(), 907)
    assert ours.control_tokens["<|user|>"] == 905
    assert ours.vocab_size == 906
    plain = ours.encode("king")
    for text in ("<|user|>\nking", "<|user|>  king", "<|user|>king"):
        assert ours.encode(text, control=True) == [905, *plain], ascii(text)
    assert ours.encode("<s>king", control=True) == [1, *plain]
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode("king").ids == [1, *plain]
    assert library.encode("king", add_special_tokens=False).ids == plain


def test_the_first_token_is_put_there_where_the_file_says_so(tmp_path: Path) -> None:
    values = sentencepiece_values()
    written(tmp_path, {**values, "add_bos_token": False, "add_space_prefix": False}, 907)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert "".join(library.encode("king").tokens) == "king"


def tiny(**changes: Any) -> dict[str, Any]:
    from phimlx.prompt.tokenizer.bpe import byte_alphabet

    tokens = [*byte_alphabet(), "he", "the", "<|endoftext|>", "<|end|>", "word", "[PAD261]"]
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array([1] * 258 + [3, 3, 4, 5]),
        "merges": ["h e", "t he"],
        "eos_token_id": 258,
        **changes,
    }


def test_ends() -> None:
    assert find_ends(tiny()) == [258, 259]
    assert find_ends(tiny(eot_token_id=260)) == [258, 260, 259]
    assert find_ends(tiny(eos_token_id=-1)) == [259, 258]
    assert find_ends({"eos_token_id": 3}) == []
    assert find_ends({}) == []


def test_tokens_that_are_no_words(tmp_path: Path) -> None:
    ours = written(tmp_path, tiny(), 270)
    assert ours.control_tokens == {"<|endoftext|>": 258, "<|end|>": 259, "word": 260}
    assert ours.encode("the word", control=True) == [*ours.encode("the "), 260]
    assert ours.encode("<|end|> \n", control=True)[1:] == ours.encode(" \n")  # swallows nothing
    older = tiny(token_type=np.array([1] * 258 + [3, 3, 4, 4]))
    assert written(tmp_path, older, 270).control_tokens == ours.control_tokens


def test_a_split_that_the_file_does_not_name(tmp_path: Path) -> None:
    values = tiny()
    del values["pre"]
    assert written(tmp_path, values, 270, default_split="gpt-2").encode("the")


BAD = [
    ({"model": "t5"}, "The file's tokenizer is of the kind 't5', and gpt2 and llama are read."),
    ({"model": None}, "The file's tokenizer is of the kind None, and gpt2 and llama are read."),
    ({"model": ["x"] * 999}, None),
    ({"tokens": []}, "The file's tokenizer has 0 tokens, and its model 262."),
    ({"tokens": ["a"] * 263}, "The file's tokenizer has 263 tokens, and its model 262."),
    ({"tokens": "abc"}, "The file's tokenizer has no list of tokens."),
    ({"tokens": np.arange(262)}, "The file's tokenizer has no list of tokens."),
    ({"tokens": ["a"] * 262}, "The file's tokenizer has a token twice."),
    (
        {"tokens": [*tiny()["tokens"][:-1], "\udce9"]},
        "The file's tokenizer has tokens that are not UTF-8 text.",
    ),
    (
        {"token_type": np.array([1, 2])},
        "The file's tokenizer has no token_type for each of its 262 tokens.",
    ),
    ({"token_type": 3}, "The file's tokenizer has no token_type for each of its 262 tokens."),
    ({"merges": None}, "The file's tokenizer has no list of merges."),
    ({"merges": ["he"]}, "The file's tokenizer merges 'he', which are no two of its tokens."),
    ({"merges": ["h e x"]}, "The file's tokenizer merges 'h e x', which are no two of its tokens."),
    ({"merges": ["h x"]}, "The file's tokenizer merges 'h x', which are no two of its tokens."),
    ({"merges": ["x" * 9999]}, None),
    (
        {"pre": "llama-bpe"},
        "The file's tokenizer splits text as 'llama-bpe'; known of the Phi family are gpt-4o, "
        "dbrx, gpt-2, phi-2, smaug-bpe.",
    ),
    ({"pre": None}, None),
    ({"pre": ["gpt-2"]}, None),
    ({"model": "llama"}, "The file's tokenizer has no scores for each of its 262 tokens."),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_cannot_be_told(changes: dict[str, Any], message: str | None) -> None:
    with pytest.raises(TokenizerError) as caught:
        restore_tokenizer(tiny(**changes), 262)
    assert message is None or str(caught.value) == message
    assert len(str(caught.value)) < 300
    assert caught.value.hint == ELSEWHERE


def test_scores_that_are_no_numbers_and_long_tokens() -> None:
    values = sentencepiece_values()
    values["tokens"][500] = "x" * 100_000
    with pytest.raises(TokenizerError, match="has a token of 100000 characters; at most 512"):
        restore_tokenizer(values, 907)
    values = sentencepiece_values()
    values["scores"][:] = np.nan
    with pytest.raises(TokenizerError, match="has scores that are not finite"):
        restore_tokenizer(values, 907)


def test_tokens_of_many_characters_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 100)
    with pytest.raises(TokenizerError, match=r"tokens of \d+ characters in all; at most 100 are"):
        restore_tokenizer(sentencepiece_values(), 907)
