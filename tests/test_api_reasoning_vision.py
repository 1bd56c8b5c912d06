"""Pictures through `Phi` of a model whose placeholders are no tokens of its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import phimlx
from phimlx.errors import GenerationError, PhimlxError, PromptError
from phimlx.generation.options import GenerationOptions
from phimlx.media.naflex import patch_grid
from tests.media.sounds import noise
from tests.reasoning_vision import IMAGE, TINY, picture, reasoning_vision_folder

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 4}
RAW = "<|im_start|>user<|im_sep|>"
LEAST = 4  # patches, where the published model has 256: the tests' pictures are small
SMALL, OTHER = picture(1, 64, 64), picture(2, 120, 60)


@pytest.fixture(scope="module")
def phi(data: Path, tmp_path_factory: pytest.TempPathFactory) -> phimlx.Phi:
    folder = reasoning_vision_folder(data, tmp_path_factory.mktemp("sees"), LEAST)
    return phimlx.load(folder, dtype="float32")


@pytest.fixture
def seen(phi: phimlx.Phi, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each run of the tower was given."""
    calls: list[int] = []
    model = type(phi.model)
    see = model.encode_media

    def counting(self: Any, **arrays: mx.array) -> Any:
        calls.append(len(arrays["pixel_values"]))
        return see(self, **arrays)

    monkeypatch.setattr(model, "encode_media", counting)
    return calls


def tokens_of(image: np.ndarray[Any, Any]) -> int:
    rows, columns = patch_grid(image.shape[1], image.shape[0], LEAST)
    return rows * columns


def test_greedy_tokens_are_the_originals(data: Path, tmp_path: Path) -> None:
    phi = phimlx.load(reasoning_vision_folder(data, tmp_path), dtype="float32")
    oracle = mx.load(str(data / TINY / "oracle.safetensors"))
    assert isinstance(oracle, dict)
    prompt = oracle["greedy.input_ids"][0].tolist()
    expected = oracle["greedy.generated"].tolist()
    image = data / TINY / "pictures" / "small.png"
    assert isinstance(prompt, list)
    assert isinstance(expected, list)
    for drafts in (True, False):
        options = {"images": image, "prompt_lookup": drafts, "max_tokens": len(expected)}
        reply = phi.generate(prompt, temperature=0, **options)
        assert reply.tokens == expected


def test_what_goes_in(phi: phimlx.Phi) -> None:
    assert phi.placeholders == {"image": IMAGE}
    assert (phi.takes_media, phi.hears) == (True, False)
    ids = phi.encode("Which?", images=[SMALL, OTHER])
    assert ids.count(IMAGE) == tokens_of(SMALL) + tokens_of(OTHER)
    raw = phi.encode(f"{RAW}<|image_1|> and <image>", images=[SMALL, OTHER], raw=True)
    assert raw.count(IMAGE) == tokens_of(SMALL) + tokens_of(OTHER)
    assert IMAGE not in phi.encode("<image>", raw=True)
    assert IMAGE not in phi.encode("<image>")


def test_messages_and_options_say_the_same(phi: phimlx.Phi) -> None:
    parts = [{"type": "image", "image": SMALL}, {"type": "text", "text": "What?"}]
    said = [{"role": "user", "content": parts}]
    assert phi.encode(said) == phi.encode("What?", images=SMALL)


def test_modes_end_the_prompt(phi: phimlx.Phi) -> None:
    tokenizer = phi.tokenizer
    assert tokenizer is not None
    plain = phi.encode("What?", images=SMALL)
    for mode, token in (("on", "<think>"), ("off", "<|dummy_84|>")):
        ids = phi.encode("What?", images=SMALL, reasoning=mode)
        assert ids == [*plain, tokenizer.control_tokens[token]]
    assert phi.encode("What?", images=SMALL, reasoning="auto") == plain
    for mode, kind in (("on", "reasoning"), ("off", "text"), ("auto", "text")):
        reader = phi.request("What?", GenerationOptions(reasoning=mode)).reader
        assert reader is not None
        assert [part.kind for part in reader.parser.feed("Hm, well.")] == [kind]
    for prompt, more in (("What?", {"raw": True}), ([5, 6], {})):
        with pytest.raises(PromptError, match="so reasoning cannot be on"):
            phi.encode(prompt, reasoning="on", **more)


def test_turns_use_what_earlier_ones_left(phi: phimlx.Phi, seen: list[int]) -> None:
    cache = phi.new_cache()
    first = f"{RAW}<image>\nWhat?"
    phi.generate(first, images=SMALL, raw=True, cache=cache, **GREEDY)
    assert seen == [1]
    second = f"{first} And <image> this?"
    images = [SMALL, OTHER]
    reply = phi.generate(second, images=images, raw=True, cache=cache, **GREEDY)
    assert seen == [1, 1]  # the second picture alone
    assert reply.stats.cached_tokens > tokens_of(SMALL)
    assert reply.tokens == phi.generate(second, images=images, raw=True, **GREEDY).tokens
    swapped = phi.generate(second, images=images[::-1], raw=True, cache=cache, **GREEDY)
    assert swapped.stats.cached_tokens < 10
    assert swapped.tokens == phi.generate(second, images=images[::-1], raw=True, **GREEDY).tokens


def test_a_cache_on_disk(phi: phimlx.Phi, seen: list[int], tmp_path: Path) -> None:
    cache = phi.new_cache()
    first = f"{RAW}<image>\nWhat?"
    phi.generate(first, images=SMALL, raw=True, cache=cache, **GREEDY)
    phi.save_cache(cache, tmp_path / "kept")
    again = phi.load_cache(tmp_path / "kept")
    assert again.tokens == cache.tokens
    reply = phi.generate(f"{first} Why?", images=SMALL, raw=True, cache=again, **GREEDY)
    assert reply.stats.cached_tokens > tokens_of(SMALL)
    assert seen == [1]
    expected = phi.generate(f"{first} Why?", images=SMALL, raw=True, **GREEDY)
    assert reply.tokens == expected.tokens


def test_requests_beside_each_other(phi: phimlx.Phi) -> None:
    """Rows with pictures and without, in one batch and one after the other."""
    prompts = [(f"{RAW}<image>a", [SMALL]), (f"{RAW}b", []), (f"{RAW}<image><image>", [OTHER] * 2)]
    sampling = phi.sampling.override(temperature=0.0)

    def requests() -> list[Any]:
        return [
            phi.request(text, GenerationOptions(images=images, raw=True, max_tokens=5), sampling)
            for text, images in prompts
        ]

    together, apart = requests(), requests()
    phi.engine.run_all(together, 3)
    for request in apart:
        phi.engine.run_all([request])
    assert [r.reply.tokens for r in together] == [r.reply.tokens for r in apart]


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_penalties_and_quantized_caches(phi: phimlx.Phi, kv_bits: int | None) -> None:
    """What stands for a picture is no token that a penalty could count."""
    options = {**GREEDY, "repetition_penalty": 1.5, "raw": True, "images": SMALL}
    if kv_bits is not None:
        with pytest.raises(GenerationError):  # heads of 16 are too narrow for groups
            phi.generate(f"{RAW}<image>a", kv_bits=kv_bits, **options)
        return
    assert len(phi.generate(f"{RAW}<image>a", **options).tokens) == 4


def test_scores_of_a_prompt(phi: phimlx.Phi) -> None:
    """Pictures have none; what follows them has that of a pass over all of it."""
    prompt = [7, IMAGE, 9, 40, 4]
    reply = phi.generate(prompt, images=SMALL, prompt_logprobs=2, **GREEDY)
    ids = phi.encode(prompt, images=SMALL)
    request = phi.request(prompt, GenerationOptions(images=SMALL))
    assert request.media is not None
    logits = phi.model(mx.array([prompt]), **request.media.arrays)[0]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert len(reply.prompt_logprobs) == len(ids)
    for place, score in enumerate(reply.prompt_logprobs):
        assert (score is None) == (place == 0 or ids[place] == IMAGE)
        if score is not None:
            assert score.token == ids[place]
            value = float(expected[place - 1, ids[place]])
            assert score.logprob == pytest.approx(value, abs=1e-4)


def test_a_long_prompt_is_cut_and_that_is_said(data: Path, tmp_path: Path, seen: list[int]) -> None:
    folder = reasoning_vision_folder(data, tmp_path, LEAST, tokenizer_model_max_length=30)
    phi = phimlx.load(folder, dtype="float32")
    size = tokens_of(SMALL)
    text = f"{RAW}<image>" + "x" * 100 + "<image>"
    reply = phi.generate(text, images=[SMALL, OTHER], raw=True, **GREEDY)
    ids = phi.encode(text, images=[SMALL, OTHER], raw=True)
    assert (len(ids), ids.count(IMAGE)) == (30, size)
    assert seen == [1]  # the second picture is behind the end
    cut = len(phi.encode(f"{RAW}{'x' * 100}", raw=True)) + size + tokens_of(OTHER) - 30
    assert reply.warnings == [
        "With pictures the model reads the first 30 tokens of a prompt: "
        f"the last {cut} of this one were left out. Show fewer or smaller pictures."
    ]
    # In the middle of a picture: the logits are those of the original, which cuts there too.
    half = phi.encode(f"{RAW}<image><image>", images=[SMALL, OTHER], raw=True)
    assert len(half) == 30
    assert half.count(IMAGE) == 30 - len(phi.encode(RAW, raw=True))
    assert (
        len(phi.generate(f"{RAW}<image><image>", images=[SMALL, OTHER], raw=True, **GREEDY).tokens)
        == 4
    )
    # Text alone is read as far as the context goes.
    assert len(phi.encode(RAW + "x" * 400, raw=True)) > 400
    assert phi.generate(RAW + "x" * 400, raw=True, **GREEDY).warnings == []


def test_a_cut_prompt_is_what_the_original_reads(data: Path, tmp_path: Path) -> None:
    folder = reasoning_vision_folder(data, tmp_path, LEAST, tokenizer_model_max_length=30)
    phi = phimlx.load(folder, dtype="float32")
    options = GenerationOptions(images=[SMALL, OTHER], max_tokens=1)
    request = phi.request([7, IMAGE, 9, IMAGE, 4], options, phi.sampling.override(temperature=0.0))
    assert request.media is not None
    whole = phi.model(mx.array([[7, IMAGE, 9, IMAGE, 4]]), **request.media.arrays)
    assert whole.shape[1] == 30
    phi.engine.run_all([request])
    assert request.reply.tokens == [int(mx.argmax(whole[0, -1]))]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {"audio": (noise(1.0), 16_000)}, "{} sees, but does not hear: it takes no sounds."),
        ("", {}, "The prompt is empty."),
        (
            f"{RAW}<image>",
            {"images": [SMALL, SMALL], "raw": True},
            "The prompt has 1 place for pictures, but 2 came with it.",
        ),
        ([5, IMAGE], {}, "The prompt has 1 placeholder tokens for pictures and sounds, but those "
         "given fill 0."),
        ([5, -1], {}, "The prompt holds -1, which is no token of a vocabulary of 512."),
    ],
)  # fmt: skip
def test_what_is_refused(
    phi: phimlx.Phi, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PhimlxError) as caught:
        phi.generate(prompt, **GREEDY, **options)
    assert str(caught.value) == message.format(phi.name)
