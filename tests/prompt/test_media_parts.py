"""Pictures and sounds in prompts, against the ids that real Phi-4-multimodal weights were given."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from phimlx.errors import PhimlxError, PromptError, TokenizerError
from phimlx.generation.media_inputs import fill
from phimlx.media.image import prepare_images
from phimlx.prompt.chat_template import ChatTemplate
from phimlx.prompt.media_parts import ContentPart, attach, expand_placeholders, source_list
from phimlx.prompt.messages import read_messages
from phimlx.prompt.published_templates import MINI
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from tests.prompt.conftest import MINI_TOKENS, Make, spelled

Models = dict[str, tuple[Tokenizer, ChatTemplate]]

PLACEHOLDERS = {"image": 200010, "audio": 200011}
CASES = (
    *("single-image", "multi-image", "short-audio", "long-audio"),
    *("image-short-audio", "image-long-audio", "multi-image-audio"),
)
PICTURE = {"type": "image", "image": b"picture"}
SOUND = {"type": "audio", "audio": b"sound"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.fixture(scope="module")
def multimodal(models: Models, data: Path) -> ChatTemplate:
    folder = data / "hf/Phi-4-multimodal-instruct"
    return ChatTemplate.load(folder, models["phi-4-multimodal"][0], placeholders=PLACEHOLDERS)


def golden(data: Path, case: str) -> tuple[str, dict[str, list[Path]], list[int]]:
    """The question, the files and the ids of a published case."""
    folder = data / "golden/real-weights"
    ids = json.loads((folder / f"golden/multimodal/phi4mm-{case}.json").read_text())["input_ids"]
    described = (folder / f"cases/multimodal/phi4mm-{case}.yaml").read_text()
    names = re.findall(r'^    - "(.*)"$', described, re.MULTILINE)
    sources = {
        "image": [data / "images" / name for name in names if name.endswith(".jpeg")],
        "audio": [data / "audio" / name for name in names if name.endswith(".flac")],
    }
    return names[0], sources, ids


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_that_the_real_weights_were_given(
    data: Path, multimodal: ChatTemplate, case: str
) -> None:
    """They were made with a line break after each picture and sound; the card's prompt has none."""
    question, sources, ids = golden(data, case)
    given = [part for kind, part in (("image", PICTURE), ("audio", SOUND)) for _ in sources[kind]]
    parts = [each for part in given for each in (part, text("\n"))]
    messages = [user(*parts, text(question))]
    ids_before = multimodal.encode(messages)
    expanded, media = fill(ids_before, PLACEHOLDERS, sources, None, prepare_images)
    assert expanded == ids
    assert media is not None
    order = [*sources["image"], *sources["audio"]]
    assert [count for _, count in media.digests] == [
        1745 if path.suffix == ".jpeg" else 114 for path in order
    ]
    assert len({digest for digest, _ in media.digests}) == len(set(order))


@pytest.mark.parametrize(
    ("images", "sounds"), [(1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (2, 1), (3, 2)]
)
@pytest.mark.parametrize("said", ["Transcribe the audio clip into text.", "\n", ""])
def test_the_prompt_is_the_published_cards(
    multimodal: ChatTemplate, images: int, sounds: int, said: str
) -> None:
    messages = attach([{"role": "user", "content": said}], ["x"] * images, ["x"] * sounds)
    tags = [f"<|image_{n + 1}|>" for n in range(images)]
    tags += [f"<|audio_{n + 1}|>" for n in range(sounds)]
    expected = f"<|user|>{''.join(tags)}{said}<|end|><|assistant|>"
    assert multimodal.render(messages) == expected
    untagged = expected
    for tag in tags:
        kind = "image" if "image" in tag else "audio"
        untagged = untagged.replace(tag, f"<|endoftext{PLACEHOLDERS[kind] % 100}|>")
    assert spelled(multimodal, messages) == untagged


def test_a_rendered_prompt_numbers_through_the_conversation(multimodal: ChatTemplate) -> None:
    messages = [
        user(PICTURE, text("What is <|image_1|>?")),
        {"role": "assistant", "content": "A disc."},
        user(SOUND, PICTURE),
    ]
    assert multimodal.render(messages, add_generation_prompt=False) == (
        "<|user|><|image_1|>What is <|image_1|>?<|end|><|assistant|>A disc.<|end|>"
        "<|user|><|audio_1|><|image_2|><|end|><|endoftext|>"
    )


def test_parts_keep_their_order(
    multimodal: ChatTemplate,
) -> None:
    messages = [
        {"role": "system", "content": [text("Be"), text(" brief.")]},
        user(text("Which? "), PICTURE, SOUND, text("or"), PICTURE),
        {"role": "assistant", "content": [text("The first.")]},
        user(SOUND),
    ]
    assert spelled(multimodal, messages) == (
        "<|system|>Be brief.<|end|>"
        "<|user|>Which? <|endoftext10|><|endoftext11|>or<|endoftext10|><|end|>"
        "<|assistant|>The first.<|end|>"
        "<|user|><|endoftext11|><|end|><|assistant|>"
    )
    tokens = {"image": [2, 1], "audio": [1, 3]}
    expanded, order = expand_placeholders(multimodal.encode(messages), PLACEHOLDERS, tokens)
    assert order == ["image", "audio", "image", "audio"]
    assert [token for token in expanded if token in PLACEHOLDERS.values()] == (
        [200010, 200010, 200011, 200010, 200011, 200011, 200011]
    )


def test_text_in_parts_is_the_same_prompt(models: Models, multimodal: ChatTemplate) -> None:
    plain = [{"role": "user", "content": "What is <|end|> MLX?"}]
    split = [user(text("What is <|en"), text("d|> MLX?"))]
    ids = models["phi-4-multimodal"][1].encode(plain)
    assert multimodal.encode(plain) == multimodal.encode(split) == ids
    assert models["phi-4-multimodal"][1].encode(split) == ids


@pytest.mark.parametrize("typed", ["<|image_1|>", "<|endoftext10|>", "<|endoftext11|>"])
def test_text_that_spells_a_placeholder_stays_text(multimodal: ChatTemplate, typed: str) -> None:
    messages = [user(text(f"See {typed}:"), PICTURE, text(typed))]
    ids = multimodal.encode(messages)
    assert Counter(ids)[200010] == 1
    assert Counter(ids)[200011] == 0
    assert spelled(multimodal, messages) == (
        f"<|user|>See {typed}:<|endoftext10|>{typed}<|end|><|assistant|>"
    )


TOKENS: tuple[Any, ...] = (
    *(token for token in MINI_TOKENS if token != "<|endoftext10|>"),
    {"content": "<|endoftext10|>", "lstrip": False, "rstrip": False, "normalized": False},
    {"content": "<|endoftext11|>", "lstrip": False, "rstrip": False, "normalized": False},
)
PICTURE_TOKEN, SOUND_TOKEN = 256 + len(TOKENS), 257 + len(TOKENS)


def tiny_chat(make_folder: Make, **placeholders: int) -> tuple[Tokenizer, ChatTemplate]:
    folder = make_folder(TOKENS, template=MINI)
    tokenizer = Tokenizer.load(folder)
    return tokenizer, ChatTemplate.load(
        folder,
        tokenizer,
        placeholders={"image": PICTURE_TOKEN, "audio": SOUND_TOKEN} | placeholders,
    )


FRAGMENTS = ("<", "<|", "endoftext", "1", "0", "10", "|>", "|", ">", "\n", " ", "the", "<|end")


@example([None])
@example(["<|endoftext", "10|>", None, "<|endoftext10|>", None])
@given(st.lists(st.sampled_from([*FRAGMENTS, None]), max_size=8))
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_only_pictures_become_placeholders_and_text_stays_text(
    make_folder: Make, pieces: list[str | None]
) -> None:
    tokenizer, chat = tiny_chat(make_folder)
    parts = [PICTURE if piece is None else text(piece) for piece in pieces] or [text("")]
    runs = "".join("\0" if piece is None else piece for piece in pieces).split("\0")
    names = tokenizer.control_tokens
    expected = [names["<|user|>"], *tokenizer.encode(runs[0].lstrip())]
    for run in runs[1:]:
        expected += [PICTURE_TOKEN, *tokenizer.encode(run)]
    expected += [names["<|end|>"], names["<|assistant|>"]]
    assert chat.encode([user(*parts)]) == expected


def test_a_model_that_reads_text_alone_says_so(models: Models) -> None:
    with pytest.raises(PromptError) as error:
        models["phi-4-mini"][1].encode([user(PICTURE, text("What is this?"))])
    assert str(error.value) == "The model reads text alone: it takes no pictures or sounds."
    assert error.value.hint == "Use nano-multimodal, which comes along, or phi-4-multimodal."


def test_a_tokenizer_without_the_placeholder_is_named(make_folder: Make) -> None:
    _, chat = tiny_chat(make_folder, image=5)
    assert spelled(chat, [user(SOUND)]) == "<|user|><|endoftext11|><|end|><|assistant|>"
    with pytest.raises(TokenizerError) as error:
        chat.encode([user(PICTURE)])
    assert str(error.value) == "The tokenizer has no token that stands for a picture."


PNG = base64.b64encode(b"\x89PNG").decode()


@pytest.mark.parametrize(
    ("part", "read"),
    [
        (
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
            ContentPart("image", b"\x89PNG"),
        ),
        (
            {"type": "image_url", "image_url": f"DATA:;BASE64,{PNG[:2]}\n{PNG[2:]}"},
            ContentPart("image", b"\x89PNG"),
        ),
        (
            {"type": "image_url", "image_url": {"url": "https://a.b/c.png", "detail": "low"}},
            ContentPart("image", "https://a.b/c.png"),
        ),
        (
            {"type": "input_audio", "input_audio": {"data": PNG, "format": "wav"}},
            ContentPart("audio", b"\x89PNG"),
        ),
        ({"type": "image", "image": Path("cat.png")}, ContentPart("image", Path("cat.png"))),
        ({"type": "audio", "audio": "jfk.wav"}, ContentPart("audio", "jfk.wav")),
    ],
)
def test_every_form_of_a_part_is_read(part: dict[str, Any], read: ContentPart) -> None:
    assert read_messages([user(part)])[0].parts == (read,)


URL = "has an image_url that is neither a data: nor an https: address."


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (user(), "messages[0] is a message whose content is an empty list."),
        (
            user(text("a"), "b"),
            "messages[0].content[1] is no part of a message: its type is one of text, image, "
            "audio, image_url, input_audio.",
        ),
        (
            user({"type": "video", "video": "a.mp4"}),
            "messages[0].content[0] is no part of a message: its type is one of text, image, "
            "audio, image_url, input_audio.",
        ),
        (user({"type": "image"}), "messages[0].content[0] has the type 'image', but no 'image'."),
        (
            user({"type": "text", "text": 3}),
            "messages[0].content[0] has a text that is not text.",
        ),
        (
            user({"type": "image_url", "image_url": {"url": "/etc/passwd"}}),
            f"messages[0].content[0] {URL}",
        ),
        (
            user({"type": "image_url", "image_url": "file:///etc/passwd"}),
            f"messages[0].content[0] {URL}",
        ),
        (user({"type": "image_url", "image_url": 7}), f"messages[0].content[0] {URL}"),
        (
            user({"type": "image_url", "image_url": "data:text/plain,hello"}),
            "messages[0].content[0] has a data: address without base64.",
        ),
        (
            user({"type": "image_url", "image_url": "data:image/png;base64,@@@@"}),
            "messages[0].content[0] has data that is not base64.",
        ),
        (
            user({"type": "image_url", "image_url": "data:image/png;base64,"}),
            "messages[0].content[0] has no data.",
        ),
        (
            user({"type": "input_audio", "input_audio": {"format": "wav"}}),
            "messages[0].content[0] has an input_audio without data.",
        ),
        (
            user({"type": "input_audio", "input_audio": {"data": "ü"}}),
            "messages[0].content[0] has data that is not base64.",
        ),
        (
            {"role": "assistant", "content": [PICTURE]},
            "messages[0] has a picture, which only a user's message can have.",
        ),
        (
            {"role": "tool", "content": [SOUND]},
            "messages[0] has a sound, which only a user's message can have.",
        ),
    ],
)
def test_a_part_that_is_none_is_named(message: dict[str, Any], error: str) -> None:
    with pytest.raises(PromptError) as raised:
        read_messages([message])
    assert str(raised.value) == error


def test_media_beside_a_prompt_goes_before_what_the_user_said_last() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [SOUND, text("b")]},
        {"role": "assistant", "content": "c"},
    ]
    array = np.zeros((2, 2, 3), np.uint8)
    attached = attach(messages, [array], ["x.wav"])
    assert [attached[0], attached[2]] == [messages[0], messages[2]]
    assert attached[1]["content"] == [
        {"type": "image", "image": array},
        {"type": "audio", "audio": "x.wav"},
        SOUND,
        text("b"),
    ]
    assert attach(messages, [], []) == messages
    assert attach([{"role": "user", "content": 3}], [array], []) == [{"role": "user", "content": 3}]
    assert attach([{"role": "user"}], [array], [])[0]["content"] == [
        {"type": "image", "image": array}
    ]
    with pytest.raises(PromptError) as error:
        attach(messages[2:], [array], [])
    assert str(error.value) == (
        "The pictures and sounds go with a user's message, and there is none."
    )


def test_a_prompt_without_text_is_the_sound_alone(multimodal: ChatTemplate) -> None:
    (message,) = attach([{"role": "user", "content": ""}], [], [b"sound"])
    assert spelled(multimodal, [message]) == "<|user|><|endoftext11|><|end|><|assistant|>"


@pytest.mark.parametrize(
    ("ids", "tokens", "error"),
    [
        ([1, 200010], {}, "The prompt has 1 place for pictures, but 0 came with it."),
        ([1], {"audio": [3]}, "The prompt has 0 places for sounds, but 1 came with it."),
    ],
)
def test_places_and_items_must_agree(
    ids: list[int], tokens: dict[str, list[int]], error: str
) -> None:
    with pytest.raises(PromptError) as raised:
        expand_placeholders(ids, PLACEHOLDERS, tokens)
    assert str(raised.value) == error


def test_one_source_or_several() -> None:
    array = np.zeros((2, 2, 3), np.uint8)
    pair = (np.zeros(3, np.float32), 16_000)
    assert source_list("images", None) == []
    assert source_list("images", "a.png") == ["a.png"]
    assert source_list("images", ["a.png", b""]) == ["a.png", b""]
    assert source_list("images", ("a.png", "b.png")) == ["a.png", "b.png"]
    assert source_list("images", array)[0] is array
    assert source_list("audio", pair) == [pair]
    with pytest.raises(PhimlxError) as error:
        source_list("images", [None])
    assert str(error.value) == "images holds nothing where a source should be: [None]."
