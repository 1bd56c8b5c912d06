"""Pictures and sounds through `Phi`: what goes in, what is kept between turns, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import phimlx
from phimlx.errors import ConfigError, GenerationError, MediaError, PhimlxError, PromptError
from phimlx.media.audio import prepare_audio
from phimlx.media.image import prepare_images
from phimlx.media.limits import Limits
from tests.media.sounds import av_video, noise, sound_file
from tests.multimodal import PICTURE, SOUND, multimodal_folder

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 4}


def picture(seed: int = 0, width: int = 200, height: int = 100) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (height, width, 3), np.uint8)


RED, BLUE = picture(1), picture(2)
HUM = (noise(1.0), 16_000)


@pytest.fixture(scope="module")
def phi(data: Path, tmp_path_factory: pytest.TempPathFactory) -> phimlx.Phi:
    folder = multimodal_folder(data, tmp_path_factory.mktemp("multimodal"))
    return phimlx.load(folder, dtype="float32")


@pytest.fixture
def seen(phi: phimlx.Phi, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many pictures and sounds each run of the encoders was given."""
    calls: list[list[int]] = []
    model = type(phi.model)
    see = model.encode_media  # type: ignore[attr-defined]

    def counting(self: Any, **arrays: mx.array) -> Any:
        names = ("input_image_embeds", "input_audio_embeds")
        calls.append([len(arrays[name]) if name in arrays else 0 for name in names])
        return see(self, **arrays)

    monkeypatch.setattr(model, "encode_media", counting)
    return calls


def message(text: str, *media: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


def shown(source: Any) -> dict[str, Any]:
    return {"type": "image", "image": source}


def test_slots_are_as_many_as_the_media_need(phi: phimlx.Phi) -> None:
    images, audio = prepare_images([RED, BLUE]), prepare_audio([HUM])
    ids = phi.encode("What?", images=[RED, BLUE], audio=HUM)
    assert ids.count(PICTURE) == sum(images.tokens)
    assert ids.count(SOUND) == sum(audio.tokens)
    once = phi.encode("What?", images=RED)
    assert phi.tokenizer is not None
    assert phi.tokenizer.decode(once) == (
        f"<|user|>{'<|endoftext10|>' * images.tokens[0]}What?<|end|><|assistant|>"
    )


@pytest.mark.parametrize(
    "media",
    [{}, {"images": [RED]}, {"audio": [HUM]}, {"images": [RED, BLUE], "audio": [HUM]}],
    ids=["text", "image", "audio", "both"],
)
def test_the_reply_is_that_of_the_model_on_the_processors_arrays(
    phi: phimlx.Phi, media: dict[str, list[Any]]
) -> None:
    arrays: dict[str, Any] = {}
    if "images" in media:
        arrays |= prepare_images(media["images"]).arrays()
    if "audio" in media:
        arrays |= prepare_audio(media["audio"]).arrays()
    reply = phi.generate("What?", **media, **GREEDY)
    ids = phi.encode("What?", **media)
    logits = phi.model(
        mx.array([ids + reply.tokens]), **{name: mx.array(a) for name, a in arrays.items()}
    )
    following = logits[0, len(ids) - 1 : -1]
    following[:, mx.array([PICTURE, SOUND])] = -mx.inf
    assert reply.tokens == following.argmax(axis=-1).tolist()
    assert reply.stats.prompt_tokens == len(ids)


def test_all_ways_to_give_a_picture_are_one(phi: phimlx.Phi, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    Image.fromarray(RED).save(path)
    cache = phi.new_cache()
    first = phi.generate("What?", images=RED, cache=cache, **GREEDY)
    for source in (str(path), path, path.read_bytes(), Image.open(path), [RED]):
        again = phi.generate("What?", images=source, cache=cache, **GREEDY)
        assert again.tokens == first.tokens
        assert again.stats.cached_tokens == first.stats.prompt_tokens - 1
    sound = sound_file(HUM[0], 16_000, "WAV", subtype="FLOAT")
    heard = phi.generate("What?", audio=HUM, cache=cache, **GREEDY)
    assert phi.generate("What?", audio=sound, cache=cache, **GREEDY).tokens == heard.tokens


def test_a_picture_is_looked_at_once_in_a_conversation(
    phi: phimlx.Phi, seen: list[list[int]]
) -> None:
    cache = phi.new_cache()
    messages = [message("What?", shown(RED))]
    reply = phi.generate(messages, cache=cache, **GREEDY)
    assert seen == [[1, 0]]
    messages += [{"role": "assistant", "content": "A."}, {"role": "user", "content": "And?"}]
    following = phi.generate(messages, cache=cache, **GREEDY)
    assert following.stats.cached_tokens >= reply.stats.prompt_tokens
    assert seen == [[1, 0]]
    messages += [{"role": "assistant", "content": "B."}, message("This?", shown(BLUE))]
    third = phi.generate(messages, cache=cache, **GREEDY)
    assert third.stats.cached_tokens >= following.stats.prompt_tokens
    assert seen == [[1, 0], [1, 0]]
    assert third.tokens == phi.generate(messages, **GREEDY).tokens


def test_a_picture_in_the_third_turn_calls_for_another_adapter(phi: phimlx.Phi) -> None:
    cache = phi.new_cache()
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Hello there."}]
    for _ in range(2):
        phi.generate(messages, cache=cache, **GREEDY)
        messages += [{"role": "assistant", "content": "A."}, {"role": "user", "content": "Go."}]
    messages[-1] = message("What?", shown(RED))
    reply = phi.generate(messages, cache=cache, **GREEDY)
    assert reply.stats.cached_tokens == 0
    assert reply.tokens == phi.generate(messages, **GREEDY).tokens


def test_two_pictures_share_nothing_and_one_twice_is_fine(phi: phimlx.Phi) -> None:
    cache = phi.new_cache()
    phi.generate("What?", images=RED, cache=cache, **GREEDY)
    other = phi.generate("What?", images=BLUE, cache=cache, **GREEDY)
    assert other.stats.cached_tokens == 1  # <|user|>
    assert other.tokens == phi.generate("What?", images=BLUE, **GREEDY).tokens
    twice = phi.encode("What?", images=[RED, RED])
    assert twice.count(PICTURE) == 2 * phi.encode("What?", images=RED).count(PICTURE)


def test_a_question_may_be_spoken(phi: phimlx.Phi) -> None:
    assert phi.tokenizer is not None
    slots = "<|endoftext11|>" * prepare_audio([HUM]).tokens[0]
    spoken = phi.tokenizer.decode(phi.encode(audio=HUM))
    assert spoken == f"<|user|>{slots}<|end|><|assistant|>"
    assert phi.generate(audio=HUM, **GREEDY).tokens
    with pytest.raises(PromptError) as error:
        phi.generate(images=RED)
    assert str(error.value) == "The prompt is empty."


def test_raw_text_and_ids_take_media_at_their_places(phi: phimlx.Phi) -> None:
    media: dict[str, Any] = {"images": [RED, BLUE], "audio": HUM}
    wide = phi.encode("What?", **media)
    raw = "<|user|><|image_1|><|image_2|><|audio_1|>What?<|end|><|assistant|>"
    assert phi.encode(raw, raw=True, **media) == wide
    assert phi.tokenizer is not None
    narrow = [
        *phi.tokenizer.encode("<|user|>", control=True),
        *(PICTURE, PICTURE, SOUND),
        *phi.tokenizer.encode("What?<|end|><|assistant|>", control=True),
    ]
    assert phi.encode(narrow, **media) == wide
    with pytest.raises(PromptError) as error:
        phi.encode("<|user|><|image_1|>", raw=True, images=[RED, BLUE])
    assert str(error.value) == "The prompt has 1 place for pictures, but 2 came with it."


def test_a_video_is_its_frames(phi: phimlx.Phi) -> None:
    video = av_video()
    for frames in (1, 3):
        ids = phi.encode("What?", video=video, frames=frames)
        assert ids.count(PICTURE) == frames * prepare_images([picture(0, 64, 48)]).tokens[0]


def test_slots_count_for_the_room(phi: phimlx.Phi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phi, "context_length", 100)
    count = len(phi.encode("What?", images=RED))
    with pytest.raises(GenerationError) as error:
        phi.stream("What?", images=RED)
    assert str(error.value) == (
        f"The prompt has {count:,} tokens, but {phi.name} holds 100 for prompt and reply together."
    )


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "What?", "images": RED},
        {"prompt": "What?", "video": b"no video"},
        {"audio": HUM},
        {"prompt": [message("What?", shown(RED))]},
        {"prompt": [5, 6], "images": [RED]},
    ],
)
def test_a_model_that_reads_text_alone_says_so(options: dict[str, Any]) -> None:
    nano = phimlx.load("nano")
    assert not nano.takes_media
    with pytest.raises(PromptError) as error:
        nano.generate(**options)
    assert str(error.value) == "nano reads text alone: it takes no pictures or sounds."
    assert error.value.hint == "Use nano-multimodal, which comes along, or phi-4-multimodal."


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"images": "none.png"}, MediaError, "There is no file none.png."),
        ({"images": [None]}, PromptError, "images holds nothing where a source should be: [None]."),
        ({"images": 3}, MediaError, "A picture cannot be made of int."),
        (
            {"images": RED, "limits": Limits(max_pixels=10)},
            MediaError,
            "The picture has 200 × 100 pixels; at most 10 are read.",
        ),
        (
            {"audio": HUM, "limits": Limits(max_seconds=0.5)},
            MediaError,
            "The sound is longer than 0.5 s.",
        ),
        (
            {"prompt": [{"role": "system", "content": "Hi."}], "images": RED},
            PromptError,
            "The pictures and sounds go with a user's message, and there is none.",
        ),
    ],
)
def test_media_that_cannot_be_taken(
    phi: phimlx.Phi, options: dict[str, Any], kind: type[PhimlxError], message: str
) -> None:
    with pytest.raises(kind) as error:
        phi.stream(**{"prompt": "What?"} | options)
    assert str(error.value) == message


def test_the_folder_says_how_many_crops_a_picture_has(data: Path, tmp_path: Path) -> None:
    folder = multimodal_folder(data, tmp_path)
    settings = folder / "preprocessor_config.json"
    large = picture(0, 900, 900)
    settings.write_text(json.dumps({"dynamic_hd": 1}))
    slots = phimlx.load(folder).encode("What?", images=large).count(PICTURE)
    assert slots == prepare_images([large], dynamic_hd=1).tokens[0]
    assert slots < prepare_images([large]).tokens[0]
    settings.write_text(json.dumps({"dynamic_hd": 10**9}))
    with pytest.raises(ConfigError) as error:
        phimlx.load(folder).encode("What?", images=large)
    assert str(error.value) == (
        "preprocessor_config.json: dynamic_hd is 1000000000; it must be from 1 to 100."
    )
