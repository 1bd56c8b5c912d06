"""Token ids against tiktoken, an independent tokenizer, and against the rules for added tokens."""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phimlx.errors import TokenizerError
from phimlx.prompt.chat_template import ChatTemplate
from phimlx.prompt.tokenizer.bpe import LibraryVocabulary
from phimlx.prompt.tokenizer.tokenizer import Detokenizer, Tokenizer
from tests.prompt.conftest import Make

Models = dict[str, tuple[Tokenizer, ChatTemplate]]

# The published split patterns, openai/tiktoken `tiktoken_ext/openai_public.py`.
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def varied_texts(count: int = 200) -> list[str]:
    """Texts of many scripts, symbols, spaces, numbers and lengths; the same on every run."""
    pick = random.Random(4)
    letters = [
        (0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF),
        (0x5D0, 0x5EA), (0x620, 0x64A), (0x900, 0x97F), (0xE00, 0xE3A), (0x1E00, 0x1EFF),
        (0x3040, 0x30FF), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x10400, 0x1044F),
    ]  # fmt: skip

    def word() -> str:
        low, high = pick.choice(letters)
        return "".join(chr(pick.randint(low, high)) for _ in range(pick.choice([1, 2, 5, 9, 60])))

    pieces: list[Any] = [
        word,
        word,
        lambda: str(pick.randrange(10 ** pick.randint(1, 14))),
        lambda: pick.choice(["1.5e-10", "0xFF", "٣٤٥", "½", "Ⅷ", "1,234,567.89", "²³"]),
        lambda: pick.choice([" ", "  ", "\t", "\n", "\r\n", "\n\n\n", " \n ", "\u3000", "\xa0"]),
        lambda: " " * pick.randint(1, 90),
        lambda: "\r\n" * pick.randint(1, 5),
        lambda: pick.choice(["👩‍👩‍👧‍👦", "🏳️‍🌈", "🇨🇭", "👍🏽", "é", "ﷺ", "\u200b", "\ufeff", "Z͑ͫ̓"]),
        lambda: pick.choice(["it's", "WE'LL", "I'M", "don'T", "'s", "y'all'd've", "’s", "O'S'S"]),
        lambda: pick.choice(["def f(x):\n\treturn x**2  # {}\n", "a += b;\r\n", "<a href='/x'>"]),
        lambda: pick.choice(["...", "!?", "—", "$%^&*()", "/// //", "https://a.b/c?d=e&f#g", "{}"]),
        lambda: chr(pick.choice([*range(32), 0x7F, 0x80, 0x85, 0x9F, 0x2028, 0xFFFD, 0x10FFFF])),
        lambda: pick.choice(["<|end|>", "<|im_start|>", "<|endoftext|>", "<think>", "<|", "|>"]),
        lambda: pick.choice("aZ9 \n.") * pick.randint(1, 200),
    ]  # fmt: skip
    return [
        "".join(pick.choice(pieces)() for _ in range(pick.randint(1, 40))) for _ in range(count)
    ]


@pytest.fixture(
    scope="session",
    params=[
        ("phi-4", "compiled"),
        ("phi-4", "library"),
        ("phi-4-mini", "compiled"),
        ("phi-4-mini", "library"),
    ],
    ids="-".join,
)
def pair(request: pytest.FixtureRequest, data: Path, models: Models) -> tuple[Tokenizer, Any]:
    """A real tokenizer and tiktoken's for the same vocabulary, from its rank file."""
    tiktoken = pytest.importorskip("tiktoken")
    model, form = request.param
    ours = models[model][0]
    if form == "library":
        folder = {"phi-4": "phi-4", "phi-4-mini": "Phi-4-mini-instruct"}[model]
        ours = Tokenizer(*LibraryVocabulary.load(data / "hf" / folder / "tokenizer.json"))
    name, pattern = {"phi-4": ("cl100k_base", CL100K), "phi-4-mini": ("o200k_base", O200K)}[model]
    lines = (data / f"golden/{name}.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    reference = tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=len(ranks)
    )
    return ours, reference


def test_varied_texts_are_varied() -> None:
    texts = varied_texts()
    assert len(set(texts)) == 200
    assert len(set("".join(texts))) > 1500


def test_ids_are_tiktokens(pair: tuple[Tokenizer, Any]) -> None:
    ours, reference = pair
    for text in varied_texts():
        assert ours.encode(text) == reference.encode_ordinary(text), ascii(text)


def test_decode_is_tiktokens(pair: tuple[Tokenizer, Any]) -> None:
    ours, reference = pair
    pick = random.Random(7)
    for _ in range(200):
        ids = [pick.randrange(reference.n_vocab) for _ in range(pick.randint(1, 30))]
        assert ours.decode(ids) == reference.decode(ids)


def test_streamed_text_is_the_whole_text(pair: tuple[Tokenizer, Any]) -> None:
    ours, reference = pair
    pick = random.Random(9)
    for _ in range(200):
        ids = [pick.randrange(reference.n_vocab) for _ in range(pick.randint(1, 30))]
        stream = ours.detokenizer()
        assert "".join([*map(stream.add, ids), stream.finish()]) == reference.decode(ids)


def test_every_ordinary_token_is_its_bytes(pair: tuple[Tokenizer, Any]) -> None:
    ours, reference = pair
    for token in range(0, reference.n_vocab, 7):
        assert ours.token_bytes(token) == reference.decode_single_token_bytes(token)


@pytest.mark.parametrize(
    ("model", "text", "ids"),
    [
        ("phi-4-mini", "<|user|> \n Hi", [200021, 12194]),
        ("phi-4-mini", " <|user|>\u3000\x85 Hi", [220, 200021, 12194]),
        ("phi-4-mini", "<|user|>\x1cHi", [200021, 216, 12194]),
        ("phi-4-mini", "<|endoftext|> Hi", [199999, 19260]),
        ("phi-4", "a \n<|im_sep|> \t b", [64, 100266, 65]),
        ("phi-4", " <|im_start|> <|im_end|> ", [100264, 100265]),
    ],
)
def test_control_tokens_swallow_white_space(
    models: Models, model: str, text: str, ids: list[int]
) -> None:
    # \x1c is white space to Python, and not to the reference.
    tokenizer = models[model][0]
    assert tokenizer.encode(text, control=True) == ids


def mixed_texts(tokens: list[str], count: int = 150) -> list[str]:
    """Control tokens, pieces of them, white space and words, in any order."""
    pick = random.Random(11)
    pieces = [
        *tokens,
        *tokens,
        " ",
        "\n",
        " \n\t",
        "\x1c",
        "\u3000\x85",
        "\u200b",
        "a",
        " b ",
        "<|",
        ">",
    ]
    return ["".join(pick.choices(pieces, k=pick.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("phi-4", "phi-4"),
        ("phi-4-mini", "Phi-4-mini-instruct"),
        ("phi-4-multimodal", "Phi-4-multimodal-instruct"),
    ],
)
def test_control_tokens_are_found_as_the_library_finds_them(
    data: Path, models: Models, model: str, folder: str
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.Tokenizer.from_file(str(data / "hf" / folder / "tokenizer.json"))
    ours = models[model][0]
    for text in mixed_texts(list(ours.control_tokens)):
        expected = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, control=True) == expected, ascii(text)


@pytest.mark.parametrize("model", ["phi-4", "phi-4-mini", "phi-4-multimodal"])
def test_text_never_yields_a_control_token(models: Models, model: str) -> None:
    tokenizer = models[model][0]
    control = set(tokenizer.control_tokens.values())
    for name in tokenizer.control_tokens:
        assert control.isdisjoint(tokenizer.encode(f"x {name} y"))
        assert tokenizer.encode(name, control=True) == [tokenizer.control_tokens[name]]


def test_tokenizer_config_overrides_added_tokens(models: Models) -> None:
    phi4, reasoning = models["phi-4"][0], models["phi-4-reasoning"][0]
    assert phi4.control_tokens["<|dummy_86|>"] == 100350
    assert reasoning.control_tokens["<think>"] == 100350
    assert reasoning.control_tokens["</think>"] == 100351
    assert "<|dummy_86|>" not in reasoning.control_tokens
    assert reasoning.decode([100350, 40, 100351]) == "<think>I</think>"
    assert reasoning.encode("<think> I </think>", control=True) == [100350, 40, 100351]


def test_placeholders_are_control_tokens_of_multimodal_alone(models: Models) -> None:
    assert models["phi-4-multimodal"][0].control_tokens["<|endoftext10|>"] == 200010
    assert "<|endoftext10|>" not in models["phi-4-mini"][0].control_tokens


def test_vocab_size(models: Models) -> None:
    assert models["phi-4"][0].vocab_size == 100352
    assert models["phi-4-mini"][0].vocab_size == 200029


# With a tokenizer made here, wherever the tests run.


def test_tiny_vocabulary(tiny: Tokenizer) -> None:
    assert tiny.encode("the heat") == [257, 32, 256, 97, 116]
    assert tiny.vocab_size == 258 + 12
    assert tiny.encode("<|user|>\n the", control=True) == [261, 257]
    assert tiny.decode([257, 32, 261]) == "the <|user|>"
    assert tiny.decode([257, 261, 32, 256], skip=[261]) == "the he"


@pytest.mark.parametrize("token", [-1, 270, 200_063, 10**9, 10**30])
def test_ids_beyond_the_vocabulary_render_as_nothing(tiny: Tokenizer, token: int) -> None:
    assert tiny.decode([257, token, 257]) == "thethe"


def test_lone_surrogates_become_replacement_characters(tiny: Tokenizer) -> None:
    assert tiny.decode(tiny.encode("a\ud800b\udfffc")) == "a\ufffdb\ufffdc"
    assert tiny.decode(tiny.encode("\ud83d\ude00")) == "😀"


def test_longest_token_wins_and_flags_count(make_folder: Make) -> None:
    plain = {"lstrip": False, "rstrip": False, "normalized": False}
    folder = make_folder(
        [
            {"content": "<a>", **plain},
            {"content": "<a><b>", **plain},
            {"content": "<w>", **plain, "single_word": True},
            {"content": "<l>", **plain, "lstrip": True},
            {"content": "<n>", **plain, "normalized": True},
            {"content": "<n><a>", **plain, "normalized": True},
        ]
    )
    tokenizer = Tokenizer.load(folder)
    encode = lambda text: tokenizer.encode(text, control=True)  # noqa: E731
    assert encode("<a><b><a>") == [259, 258]
    assert encode("x<w>") == [120, *b"<w>"]
    assert encode("x <w>.") == [120, 32, 260, 46]
    assert encode("x <a> <l>") == [120, 32, 258, 261]
    assert encode("<n><a>") == [262, 258]
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in mixed_texts(list(tokenizer.control_tokens)):
        assert encode(text) == library.encode(text, add_special_tokens=False).ids, ascii(text)


def test_runs_of_spaces_are_text_and_no_control_tokens(make_folder: Make) -> None:
    blank = {"lstrip": False, "rstrip": False, "normalized": True}
    tokenizer = Tokenizer.load(make_folder([{"content": "    ", **blank}, "<|end|>"]))
    assert tokenizer.encode("a    b<|end|>") == [97, 258, 98, *b"<|end|>"]
    assert list(tokenizer.control_tokens) == ["<|end|>"]


@given(st.lists(st.integers(0, 269)), st.sets(st.integers(0, 269), max_size=3))
@settings(max_examples=200, deadline=None)
def test_streaming_equals_decoding(ids: list[int], skip: set[int]) -> None:
    pieces = [bytes([token]) if token < 256 else b"the" for token in range(270)]
    stream = Detokenizer(pieces.__getitem__, skip)
    whole = b"".join(pieces[token] for token in ids if token not in skip)
    assert "".join([*map(stream.add, ids), stream.finish()]) == whole.decode(errors="replace")


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError) as error:
        Tokenizer.load(tmp_path)
    assert str(error.value) == f"There is no tokenizer.json in {tmp_path}."
    assert error.value.hint == (
        "Text needs a tokenizer: get the model's tokenizer files into that folder."
    )


def test_an_endless_added_token(make_folder: Make) -> None:
    folder = make_folder(["<|end|>", "x" * 1025])
    with pytest.raises(TokenizerError) as error:
        Tokenizer.load(folder)
    assert str(error.value) == (
        f"The tokenizer in {folder} has an added token of 1025 characters; at most 1024 are read."
    )
    assert error.value.hint == "Download the model again."


def test_damaged_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(TokenizerError) as error:
        Tokenizer.load(tmp_path)
    assert str(error.value) == (
        f"{path} is not JSON (line 1, column 2: Expecting property name enclosed in double quotes)."
    )
    assert error.value.hint == "Download the model again."


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "{path} is not a JSON object."),
        ("{", "{path} is not JSON (line 1, column 2: Expecting property name enclosed in double "
              "quotes)."),
        ('{"added_tokens_decoder": [1]}',
         "{path} has an added_tokens_decoder that is not a table of tokens."),
        ('{"added_tokens_decoder": {"x": {"content": "<a>"}}}',
         "{path} has an added_tokens_decoder that is not a table of tokens."),
        ('{"added_tokens_decoder": {"1": {}}}',
         "{path} has an added_tokens_decoder that is not a table of tokens."),
        ("[" * 100_000, "{path} is nested too deeply."),
    ],
)  # fmt: skip
def test_damaged_tokenizer_config(make_folder: Make, config: str, message: str) -> None:
    folder = make_folder()
    path = folder / "tokenizer_config.json"
    path.write_text(config)
    with pytest.raises(TokenizerError) as error:
        Tokenizer.load(folder)
    assert str(error.value) == message.format(path=path)
    assert error.value.hint == "Download the model again."
