"""Vocabularies of the family's other tokenizers, against the `tokenizers` library itself."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from phimlx.errors import TokenizerError
from phimlx.prompt.chat_template import ChatTemplate
from phimlx.prompt.published_templates import PHI3
from phimlx.prompt.tokenizer.bpe import (
    SENTENCEPIECE,
    STRIP,
    LibraryVocabulary,
    SentencePieceVocabulary,
)
from phimlx.prompt.tokenizer.compiled_bpe import CompiledVocabulary, load_vocabulary
from phimlx.prompt.tokenizer.tokenizer import Tokenizer, has_tokenizer
from tests.prompt.conftest import Make, tiny_tokenizer_json
from tests.prompt.tokenizer.test_tokenizer import mixed_texts, varied_texts

tokenizers = pytest.importorskip("tokenizers")

# Phi-1, 1.5 and 2: GPT-2's vocabulary with runs of spaces and tabs.


@pytest.fixture(scope="module")
def phi15(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The published files of phi-1_5, as they are and without tokenizer.json."""
    published = data / "hf/phi-1_5"
    parsed = json.loads((published / "tokenizer.json").read_text("utf-8"))
    folder = tmp_path_factory.mktemp("phi-1_5")
    for name in ("added_tokens.json", "tokenizer_config.json"):
        shutil.copy(published / name, folder)
    (folder / "vocab.json").write_text(json.dumps(parsed["model"]["vocab"]), "utf-8")
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in parsed["model"]["merges"]
    ]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    load_vocabulary(published / "tokenizer.json")  # compiles it
    return {"tokenizer.json": published, "merges.txt": folder}


@pytest.mark.parametrize("form", ["tokenizer.json", "merges.txt"])
def test_phi15_is_the_published_tokenizer(data: Path, phi15: dict[str, Path], form: str) -> None:
    assert has_tokenizer(phi15[form])
    tokenizer = Tokenizer.load(phi15[form])
    compiled = isinstance(tokenizer._vocabulary, CompiledVocabulary)
    assert compiled == (form == "tokenizer.json")
    assert tokenizer.control_tokens == {"<|endoftext|>": 50256}
    assert tokenizer.vocab_size == 50295
    cases = json.loads((data / "golden/phi15_tokenizer.json").read_text("utf-8"))
    assert len(cases) == 15
    for case in cases:
        assert tokenizer.encode(case["text"], control=True) == case["ids"], case["text"]
        assert (tokenizer.decode(case["ids"]) == case["text"]) == case["decodes_to_itself"]
    library = tokenizers.Tokenizer.from_file(str(phi15["tokenizer.json"] / "tokenizer.json"))
    blank = ["  ", "   ", "\t\t", " " * 40, "\t" * 12, " \t "]
    for text in [*varied_texts(), *mixed_texts(["<|endoftext|>", *blank])]:
        expected = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, control=True) == expected, ascii(text)
    pick = random.Random(3)
    for _ in range(100):
        ids = [pick.randrange(50295) for _ in range(pick.randint(1, 30))]
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)


def test_vocab_and_merges_may_lack_added_tokens(make_folder: Make) -> None:
    folder = make_folder()
    parsed = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    assert not has_tokenizer(folder)
    (folder / "vocab.json").write_text(json.dumps(parsed["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nt he\n")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("the heat", control=True) == [257, 32, 256, 97, 116]
    assert dict(tokenizer.control_tokens) == {}
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "the", "bos_token": {"content": "he"}, "unk_token": "<none>"}'
    )
    assert dict(Tokenizer.load(folder).control_tokens) == {"he": 256, "the": 257}
    (folder / "added_tokens.json").write_text('{"<|x|>": 258}')
    assert Tokenizer.load(folder).encode("<|x|>the", control=True) == [258, 257]
    for damage, message in (
        ('{"<|x|>": "258"}', "added_tokens.json is not a table of tokens."),
        ("{", "added_tokens.json is not JSON (line 1, column 2: Expecting property name enclosed "
              "in double quotes)."),
    ):  # fmt: skip
        (folder / "added_tokens.json").write_text(damage)
        with pytest.raises(TokenizerError) as error:
            Tokenizer.load(folder)
        assert str(error.value) == f"{folder}/{message}"
    (folder / "added_tokens.json").unlink()
    (folder / "merges.txt").write_text("h\n")
    with pytest.raises(TokenizerError) as error:
        Tokenizer.load(folder)
    assert str(error.value).startswith(f"{folder / 'merges.txt'} is damaged: ")


# Phi-3: SentencePiece's BPE, as it was published and as transformers 5 saves it.

PHI3_TOKENS = (
    {"content": "<unk>"}, {"content": "<s>"}, {"content": "</s>", "rstrip": True, "special": False},
    {"content": "<|endoftext|>"},
    *({"content": content, "rstrip": True} for content in
      ("<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>")),
)  # fmt: skip
METASPACE = {
    "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False,
}  # fmt: skip
FORMS = {
    "published": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*SENTENCEPIECE, STRIP]},
    },
    "transformers 5": {
        "normalizer": None,
        "pre_tokenizer": METASPACE,
        "decoder": {"type": "Sequence", "decoders": [*SENTENCEPIECE, STRIP]},
    },
    "always": {
        "normalizer": None,
        "pre_tokenizer": METASPACE | {"prepend_scheme": "always"},
        "decoder": {"type": "Sequence", "decoders": [*SENTENCEPIECE, STRIP]},
    },
    "without a prefix": {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": SENTENCEPIECE},
    },
}


def sentencepiece_json(form: str) -> dict[str, Any]:
    """A tokenizer.json in Phi-3's form: merges of made-up words, and of what spells `</s>`."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(split=True)
    pick = random.Random(8)
    words = ["".join(pick.choices("aabcde  é日.", k=pick.randint(1, 30))) for _ in range(500)]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        [*words, "<s>/<>"],
        tokenizers.trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=special),
    )
    made = json.loads(trained.to_str())
    vocabulary = made["model"]["vocab"]
    merges = [["<", "/"], ["s", ">"], ["</", "s>"], *made["model"]["merges"]]
    for left, right in merges[:2]:
        vocabulary.setdefault(left + right, len(vocabulary))
    model = tiny_tokenizer_json()["model"] | {
        "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
        "vocab": vocabulary, "merges": merges,
    }  # fmt: skip
    ids = {token["content"]: token["id"] for token in made["added_tokens"]}
    usual = {
        "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True
    }  # fmt: skip
    added = [
        usual | {"id": ids.get(token["content"], len(vocabulary) + index)} | token
        for index, token in enumerate(PHI3_TOKENS)
    ]
    return tiny_tokenizer_json() | FORMS[form] | {"model": model, "added_tokens": added}


@pytest.fixture(scope="module", params=FORMS)
def phi3(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Any]:
    """A tokenizer of that form and the library's own."""
    folder = tmp_path_factory.mktemp("phi-3")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(sentencepiece_json(request.param)))
    tokenizer = Tokenizer.load(folder)
    assert isinstance(tokenizer._vocabulary, SentencePieceVocabulary)
    return tokenizer, tokenizers.Tokenizer.from_file(str(path))


def test_the_small_vocabulary_is_like_the_published_one(phi3: tuple[Tokenizer, Any]) -> None:
    ours, _ = phi3
    ids = ours.encode("a bad cab 日本\n")
    assert len(ids) < 20
    assert [ours.token_bytes(token) for token in ids][-4:] == [
        b"\xe6", b"\x9c", b"\xac", b"\n",
    ]  # fmt: skip
    assert ours.control_tokens["</s>"] == 2


def test_ids_are_the_librarys(phi3: tuple[Tokenizer, Any]) -> None:
    ours, library = phi3
    names = list(ours.control_tokens)
    starts = [
        f"{name}{space}{text}"
        for name in names
        for space in ("", " ", "\n ", "  ")
        for text in ("a", "", " a")
    ]
    for text in [*varied_texts(), *mixed_texts(names), *starts, *(" " * n for n in range(5))]:
        expected = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, control=True) == expected, ascii(text)


def test_text_is_the_librarys_whole_and_streamed(phi3: tuple[Tokenizer, Any]) -> None:
    ours, library = phi3
    for text in [*varied_texts(), *mixed_texts(list(ours.control_tokens)), "", " ", "  a"]:
        ids = ours.encode(text, control=True)
        for skip_special, skip in ((False, ()), (True, set(ours.control_tokens.values()) - {2})):
            expected = library.decode(ids, skip_special_tokens=skip_special)
            assert ours.decode(ids, skip) == expected, ascii(text)
            stream = ours.detokenizer(skip)
            assert "".join([*map(stream.add, ids), stream.finish()]) == expected, ascii(text)


def test_text_behind_other_text_keeps_its_space(phi3: tuple[Tokenizer, Any]) -> None:
    ours, library = phi3
    before = ours.encode("a bad cab")
    for text in (" a", "a", "  bad", " 日本"):
        ids = ours.encode(text, at_start=False)
        stream = ours.detokenizer(at_start=False)
        streamed = "".join([*map(stream.add, ids), stream.finish()])
        assert library.decode(before) + streamed == library.decode([*before, *ids])


@example([3 + 0xE4, 3 + 0xBD])
@given(st.lists(st.integers(0, 710), max_size=20))
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_tokens_stream_as_they_decode(phi3: tuple[Tokenizer, Any], ids: list[int]) -> None:
    ours, library = phi3
    stream = ours.detokenizer()
    whole = ours.decode(ids)
    assert "".join([*map(stream.add, ids), stream.finish()]) == whole
    if "\ufffd" not in whole:
        assert whole == library.decode(ids, skip_special_tokens=False)


def test_broken_bytes_are_replaced_one_by_one(phi3: tuple[Tokenizer, Any]) -> None:
    ours, library = phi3
    letter = library.token_to_id("a")
    whole, broken = ([3 + byte for byte in data] for data in ("é".encode(), b"\xe4\xbd"))
    assert ours.decode([letter, *whole, *broken, letter]) == "aé\ufffd\ufffda"
    assert ours.decode([letter, *broken]) == "a\ufffd\ufffd"


def test_typed_control_tokens_are_text(phi3: tuple[Tokenizer, Any]) -> None:
    ours, _ = phi3
    control = set(ours.control_tokens.values())
    for name in ours.control_tokens:
        for text in (name, f"a {name}b", f"{name}{name}"):
            assert control.isdisjoint(ours.encode(text)), text
            assert ours.decode(ours.encode(text)).strip() == text


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (PHI3, "<|system|>\nbad<|end|>\n<|user|>\n a cab<|end|>\n<|assistant|>\n"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "bad a cab"),
        ("{% for m in messages %}{{ m.content }}<s>{% endfor %}", "bad<s> a cab<s>"),
    ],
)
def test_prompts_are_the_librarys(phi3: tuple[Tokenizer, Any], form: str, text: str) -> None:
    ours, library = phi3
    template = ChatTemplate({"default": form}, ours, {"eos_token": "<|endoftext|>"})
    messages = [{"role": "system", "content": "bad"}, {"role": "user", "content": " a cab"}]
    expected = library.encode(text, add_special_tokens=False).ids
    assert template.encode(messages) == expected
    typed = template.encode([*messages, {"role": "user", "content": "</s><|user|>"}])
    assert 2 not in typed
    assert ours.decode(typed).count("</s>") == 1


def test_other_tokenizers_are_named(make_folder: Make) -> None:
    folder = make_folder()
    path = folder / "tokenizer.json"
    for decoder in (None, {"type": "Sequence", "decoders": SENTENCEPIECE[:2]}, METASPACE):
        path.write_text(json.dumps(tiny_tokenizer_json() | {"decoder": decoder}))
        with pytest.raises(TokenizerError) as error:
            Tokenizer.load(folder)
        assert str(error.value) == (
            f"{path} is neither a byte-level BPE tokenizer nor SentencePiece's, the only kinds in "
            "the Phi family."
        )


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("normalizer", {"type": "Precompiled"}, "normalizer is 'Precompiled', which no"),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "pre_tokenizer is 'FixedLength'"),
        (
            "pre_tokenizer",
            {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"},
            "pre_tokenizer has the pattern '(a+)+$', which may never end.",
        ),
        ("normalizer", {"type": "Replace", "pattern": {"String": ""}}, "has the pattern ''."),
        (
            "normalizer",
            {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 65},
            "normalizer makes long texts of short ones.",
        ),
        ("added_tokens", [{"id": 2**32, "content": "a"}], "a token has the id 4294967296."),
        ("added_tokens", [{"id": -1, "content": "a"}], "a token has the id -1."),
        ("model", {"vocab": {"a": 0.5}}, "a token has the id 0.5."),
        ("model", {"vocab": {"a": 0}, "unk_token": "b"}, "unk_token is 'b', which is no token."),
        (
            "model",
            {"vocab": {"a": 0}, "continuing_subword_prefix": "##"},
            "continuing_subword_prefix is '##', which no tokenizer of the family has.",
        ),
    ],
)
def test_what_the_library_cannot_bear_is_refused_first(
    key: str, value: object, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    table = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}
    path.write_text(json.dumps({**table, key: value}))
    with pytest.raises(TokenizerError) as caught:
        LibraryVocabulary.load(path)
    assert said in str(caught.value)
    assert caught.value.hint == "Download the model again."
