"""Compiled vocabularies: the library's ids, and no trust in what the cache holds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phimlx.prompt.tokenizer import compiled_bpe as compiled
from phimlx.prompt.tokenizer.bpe import LibraryVocabulary
from phimlx.prompt.tokenizer.compiled_bpe import CompiledVocabulary, load_vocabulary
from tests.prompt.conftest import Make, tiny_tokenizer_json


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(compiled, "MIN_SOURCE", 0)
    monkeypatch.setattr(compiled, "cache_folder", lambda: folder)
    return folder


@pytest.fixture
def source(make_folder: Make) -> Path:
    return make_folder() / "tokenizer.json"


def rewrite(path: Path, **changes: Any) -> None:
    tokenizer = tiny_tokenizer_json()
    tokenizer["model"] |= {key: changes.pop(key) for key in [*changes] if key in tokenizer["model"]}
    path.write_text(json.dumps(tokenizer | changes))


def trained(path: Path) -> None:
    """A tokenizer.json with some hundred merges, learned by the library from made-up words."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    pick = random.Random(5)
    words = ["".join(pick.choices("aabcdeé日 \n", k=pick.randint(1, 9))) for _ in range(3000)]
    tokenizer.train_from_iterator(
        words,
        tokenizers.trainers.BpeTrainer(
            vocab_size=900,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|end|>"],
        ),
    )
    tokenizer.save(str(path))


def test_the_second_load_is_compiled_and_equal(source: Path, small_ones_too: Path) -> None:
    first, added = load_vocabulary(source)
    second, same = load_vocabulary(source)
    assert isinstance(first, LibraryVocabulary)
    assert isinstance(second, CompiledVocabulary)
    assert (added, first.size) == (same, second.size)
    assert [first.token_bytes(i) for i in range(258)] == [second.token_bytes(i) for i in range(258)]
    assert len(list(small_ones_too.iterdir())) == 1


@given(
    st.lists(st.sampled_from("aabbcdeé日 \n't<|end|>") | st.characters(), max_size=60).map("".join)
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_ids_are_the_librarys(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "trained.json"
    if not path.exists():
        trained(path)
    text = text.encode(errors="replace").decode()
    load_vocabulary(path)
    vocabulary, _ = load_vocabulary(path)
    assert isinstance(vocabulary, CompiledVocabulary)
    assert vocabulary.encode(text) == LibraryVocabulary.load(path)[0].encode(text)


@pytest.mark.parametrize("limit", ["MAX_TEXT", "MAX_WORD"])
def test_long_texts_are_left_to_the_library(
    source: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    load_vocabulary(source)
    vocabulary, _ = load_vocabulary(source)
    monkeypatch.setattr(compiled, limit, 2)
    monkeypatch.setattr(LibraryVocabulary, "encode", lambda self, text: [-1])
    assert vocabulary.encode("th") == [116, 104]
    assert vocabulary.encode("the") == [-1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda made: b"",
        lambda made: made[:20],
        lambda made: made[:-8],
        lambda made: made + b"\0" * 8,
        lambda made: made[:200] + bytes([made[200] ^ 1]) + made[201:],
        lambda made: made[:-1] + bytes([made[-1] ^ 128]),
        lambda made: b"x" + made[1:],
        lambda made: made[:8] + b"\xff\0\0\0" + made[12:],
    ],
    ids=["empty", "cut", "short", "long", "bit", "last bit", "magic", "format"],
)
def test_a_damaged_file_is_replaced(source: Path, small_ones_too: Path, damage: Any) -> None:
    load_vocabulary(source)
    (file,) = small_ones_too.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    vocabulary, _ = load_vocabulary(source)
    assert isinstance(vocabulary, LibraryVocabulary)
    assert file.read_bytes() == good
    assert isinstance(load_vocabulary(source)[0], CompiledVocabulary)


def test_a_changed_tokenizer_is_compiled_anew(source: Path) -> None:
    load_vocabulary(source)
    rewrite(source, merges=[["h", "e"]], vocab=tiny_tokenizer_json()["model"]["vocab"])
    assert load_vocabulary(source)[0].encode("the") == [116, 256]
    assert load_vocabulary(source)[0].encode("the") == [116, 256]


def test_a_cache_that_cannot_be_written_is_told_once(
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    monkeypatch.setattr(compiled, "cache_folder", lambda: folder)
    monkeypatch.setattr(compiled, "_compile", None)
    for _ in range(2):
        assert isinstance(load_vocabulary(source)[0], LibraryVocabulary)
    assert [(record.name, record.levelname) for record in caplog.records] == [("phimlx", "WARNING")]
    assert caplog.messages == [
        f"The compiled vocabulary cannot be kept in {folder} (not a directory), so that loading a "
        "tokenizer takes longer each time."
    ]


def test_a_disk_that_fills_up_leaves_nothing(
    source: Path,
    small_ones_too: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert isinstance(load_vocabulary(source)[0], LibraryVocabulary)
    assert list(small_ones_too.iterdir()) == []
    assert "no space left on device" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"byte_fallback": True},
        {"ignore_merges": True},
        {"vocab": {"h": 0, "e": 1, "he": 2}, "merges": [["h", "e"]]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_unfamiliar_vocabularies_are_left_to_the_library(
    source: Path, small_ones_too: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    rewrite(source, **changes)
    load_vocabulary(source)
    monkeypatch.setattr(compiled, "_compile", None)  # found unfit once, and remembered
    assert isinstance(load_vocabulary(source)[0], LibraryVocabulary)
    assert len(list(small_ones_too.iterdir())) == 1


def test_a_compiled_vocabulary_that_disagrees_is_not_used(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(CompiledVocabulary, "_merge", lambda self, word: (0,))
        load_vocabulary(source)
    assert isinstance(load_vocabulary(source)[0], LibraryVocabulary)


def test_small_files_are_not_compiled(
    source: Path, small_ones_too: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "MIN_SOURCE", 2**20)
    assert isinstance(load_vocabulary(source)[0], LibraryVocabulary)
    assert not small_ones_too.exists()
