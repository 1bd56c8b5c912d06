"""The engine with pictures and sounds: caches kept between calls change nothing, and save work.

The model is the tiny multimodal one whose logits the original code has given; here its own whole
passes, which equal those, are what every shortcut is compared with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import GenerationError, PromptError
from phimlx.generation import batch, prefill
from phimlx.generation.engine import Engine
from phimlx.generation.placed_media import Media
from phimlx.generation.prompt_cache import PromptCache
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.generation.speculation import PromptLookup
from phimlx.models.features import Features
from phimlx.models.phi4mm.model import Phi4MMForCausalLM

IMAGE, AUDIO = 510, 511
MINI = Path(__file__).parents[1] / "goldens" / "models" / "mini-step-32"


@pytest.fixture(scope="module")
def folder(data: Path) -> Path:
    return data / "tiny" / "tiny-phi4mm-remote"


@pytest.fixture(scope="module")
def model(folder: Path) -> Phi4MMForCausalLM:
    loaded = load_model(Checkpoint(folder), mx.float32)
    assert isinstance(loaded, Phi4MMForCausalLM)
    return loaded


@pytest.fixture
def seen(model: Phi4MMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many pictures and clips each run of the encoders saw."""
    runs: list[tuple[int, int]] = []
    see = Phi4MMForCausalLM.encode_media

    def spy(self: Phi4MMForCausalLM, **arrays: mx.array) -> Features:
        counts = [
            arrays[n].shape[0] if n in arrays else 0 for n in ("image_sizes", "audio_embed_sizes")
        ]
        if any(counts):
            runs.append((counts[0], counts[1]))
        return see(self, **arrays)

    monkeypatch.setattr(Phi4MMForCausalLM, "encode_media", spy)
    return runs


def words(count: int, start: int = 3) -> list[int]:
    return [start + (7 * i) % 500 for i in range(count)]


def picture(name: str) -> tuple[list[int], Media]:
    """Drawn from its name, 275 tokens: a whole view and one crop with two patches square."""
    key = mx.random.key(sum(name.encode()))
    mask = np.zeros((1, 2, 32, 32), np.float32)
    mask[:, 0] = 1
    mask[:, 1, :2, :2] = 1
    arrays = {
        "input_image_embeds": mx.random.uniform(-1, 1, (1, 2, 3, 448, 448), key=key),
        "image_sizes": mx.array([[448, 448]]),
        "image_attention_mask": mx.array(mask),
    }
    count = 16 * 17 + 1 + 2
    return [IMAGE] * count, Media(arrays, ((name.encode(), count),))


def sound(name: str, frames: int = 80) -> tuple[list[int], Media]:
    """Drawn from its name."""
    key = mx.random.key(sum(name.encode()))
    count = -(-frames // 8)
    arrays = {
        "input_audio_embeds": mx.random.normal((1, frames, 80), key=key),
        "audio_embed_sizes": mx.array([count]),
    }
    return [AUDIO] * count, Media(arrays, ((name.encode(), count),))


def together(*parts: Media) -> Media:
    """The items of several prompts in one, in that order; sounds of one length."""
    arrays: dict[str, list[mx.array]] = {}
    for part in parts:
        for name, array in part.arrays.items():
            arrays.setdefault(name, []).append(array)
    joined = {name: mx.concatenate(found) for name, found in arrays.items()}
    return Media(joined, tuple(item for part in parts for item in part.digests))


def greedy(
    model: Phi4MMForCausalLM,
    prompt: list[int],
    media: Media | None,
    count: int,
    cache: PromptCache | None = None,
    report: Any = None,
) -> list[int]:
    sampler = Sampler(Sampling(), 0)
    request = Request(prompt, sampler, count, media=media, cache=cache, on_prefill=report)
    list(Engine(model).run(request))
    return request.reply.tokens


def plain(
    model: Phi4MMForCausalLM, prompt: list[int], media: Media | None, count: int
) -> list[int]:
    """Greedy decoding by a whole pass for every token."""
    features = model.encode_media(**(media.arrays if media else {}))
    tokens = list(prompt)
    for _ in range(count):
        logits = model.head(model.hidden_states(mx.array([tokens]), features=features))[0, -1]
        tokens.append(int(logits[:IMAGE].argmax().item()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ["image", "audio", "both"])
def test_drafts_change_nothing(
    model: Phi4MMForCausalLM, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What is drafted is right for some tokens, then wrong, then a placeholder."""
    (pixels, first), (samples, second) = picture("a"), sound("b")
    media = {"image": first, "audio": second, "both": together(first, second)}[kind]
    slots = {"image": pixels, "audio": samples, "both": [*pixels, 5, *samples]}[kind]
    prompt = [*words(3), *slots, *words(4)]
    expected = plain(model, prompt, media, 12)
    text = prompt + expected

    class Foresight(PromptLookup):
        def draft(self, limit: int = 31) -> list[int]:
            right = text[len(self) : len(self) + len(self) % 4]
            return [*right, 3, AUDIO, IMAGE][:limit]

    monkeypatch.setattr(batch, "PromptLookup", Foresight)
    sampler = Sampler(Sampling(), 0)
    request = Request(prompt, sampler, 12, media=media, cache=PromptCache(model))
    list(Engine(model).run(request))
    assert request.reply.tokens == expected
    assert request.reply.stats.accepted_tokens
    follow = [*prompt, *expected, 7, 8]
    assert greedy(model, follow, media, 5, request.cache) == plain(model, follow, media, 5)


def kept(cache: PromptCache) -> tuple[int, int]:
    """Image and audio placeholders whose features a cache holds."""
    return cache.kv.features[0].counts


def test_a_picture_and_a_sound(model: Phi4MMForCausalLM) -> None:
    (pixels, first), (samples, second) = picture("a"), sound("b")
    prompt = [*words(3), *pixels, 5, *samples, *words(4)]
    media = together(first, second)
    assert greedy(model, prompt, media, 6) == plain(model, prompt, media, 6)
    assert greedy(model, words(9), None, 6) == plain(model, words(9), None, 6)


@pytest.mark.parametrize("chunk", [1, 40, 200])
def test_prefill_in_pieces(
    model: Phi4MMForCausalLM, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture comes last: the first pieces have its adapter all the same."""
    (samples, first), (pixels, second) = sound("b"), picture("a")
    items = [first] if chunk == 1 else [first, second]
    prompt = [*words(3), *samples, *words(2), *(pixels if chunk > 1 else []), *words(4)]
    media = together(*items)
    expected = plain(model, prompt, media, 4)
    monkeypatch.setattr(prefill, "prefill_tokens", lambda: chunk)
    cache = PromptCache(model)
    adapters = []

    def report(*_: int) -> None:
        adapters.append(cache.kv.adapters)

    assert greedy(model, prompt, media, 4, cache, report) == expected
    assert set(adapters) == {("speech",) if chunk == 1 else ("vision",)}


def test_turns_compute_and_see_only_what_is_new(
    model: Phi4MMForCausalLM, seen: list[tuple[int, int]]
) -> None:
    samples, heard = sound("b")
    pixels, shown = picture("a")
    others, heard_later = sound("c")
    turns: list[tuple[list[int], list[Media]]] = [
        (words(6), []),
        ([*words(2), *samples, *words(3)], [heard]),
        (words(4, 30), []),
        ([*words(2), *pixels, *words(3)], [heard, shown]),
        ([*words(2), *others, *words(3)], [heard, shown, heard_later]),
        (words(5, 60), [heard, shown, heard_later]),
    ]
    cache, said = PromptCache(model), []
    computed: list[int] = []

    def report(_: int, to_compute: int) -> None:
        computed.append(to_compute)

    lengths, media = [], None
    for new, given in turns:
        said += new
        media = together(*given) if given else media
        runs = list(seen)
        expected = plain(model, said, media, 3)
        seen[:] = runs
        lengths.append(len(said))
        reply = greedy(model, said, media, 3, cache, report)
        assert reply == expected
        said += reply
    # The sound, and then the picture, call for another adapter: all is computed again; the last
    # of three reply tokens is never fed.
    assert computed == [6, lengths[1], 5, lengths[3], 16, 6]
    assert seen == [(0, 1), (1, 0), (0, 1)]


def test_another_picture_shares_no_slot(
    model: Phi4MMForCausalLM, seen: list[tuple[int, int]]
) -> None:
    cache, computed = PromptCache(model), []

    def report(_: int, to_compute: int) -> None:
        computed.append(to_compute)

    for name in ("a", "b", "a", "a"):
        pixels, media = picture(name)
        prompt = [*words(3), *pixels, *words(4)]
        expected = plain(model, prompt, media, 2)
        seen.clear()
        assert greedy(model, prompt, media, 2, cache, report) == expected
        assert seen == ([] if len(computed) == 4 else [(1, 0)])
    length = len(prompt)
    assert computed == [length, length - 3, length - 3, 1]


def test_the_second_of_two_pictures_changes(
    model: Phi4MMForCausalLM, seen: list[tuple[int, int]]
) -> None:
    cache = PromptCache(model)
    for name, runs in (("b", [(2, 0)]), ("c", [(1, 0)])):
        (pixels, first), (others, second) = picture("a"), picture(name)
        prompt = [*words(3), *pixels, 5, *others, *words(2)]
        media = together(first, second)
        expected = plain(model, prompt, media, 2)
        seen.clear()
        assert greedy(model, prompt, media, 2, cache) == expected
        assert seen == runs


def test_half_a_sound_is_kept(model: Phi4MMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of it: the rest of its slots is filled from the right place."""
    samples, media = sound("b")
    prompt = [*words(3), *samples, *words(4)]
    expected = plain(model, prompt, media, 3)
    monkeypatch.setattr(prefill, "prefill_tokens", lambda: 4)
    cache = PromptCache(model)

    def stop(done: int, _: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        greedy(model, prompt, media, 3, cache, stop)
    assert len(cache.tokens) == 8
    assert kept(cache) == (0, 5)
    assert greedy(model, prompt, media, 3, cache) == expected


def test_going_back_to_text(model: Phi4MMForCausalLM) -> None:
    pixels, media = picture("a")
    cache = PromptCache(model)
    greedy(model, [*words(5), *pixels, *words(4)], media, 3, cache)
    assert kept(cache) == (275, 0)
    assert greedy(model, words(9), None, 4, cache) == plain(model, words(9), None, 4)
    assert cache.kv.adapters == (None,)
    assert kept(cache) == (0, 0)


def test_requests_in_turn(model: Phi4MMForCausalLM) -> None:
    (pixels, first), (samples, second) = picture("a"), sound("b")
    prompts: list[tuple[list[int], Media | None]] = [
        ([*words(3), *pixels, *words(2)], first),
        ([*words(3), *samples, *words(2)], second),
        (words(12), None),
    ]
    expected = [plain(model, prompt, media, 4) for prompt, media in prompts]
    engine = Engine(model)
    requests = [Request(p, Sampler(Sampling(), 0), 4, media=media) for p, media in prompts]
    streams = [engine.run(request) for request in requests]
    read = [tuple(chunk.token for chunk in chunks) for chunks in zip(*streams, strict=True)]
    assert read == list(zip(*expected, strict=True))


def test_a_clip_that_folds_is_another_beside_others(model: Phi4MMForCausalLM) -> None:
    """Alone the padding of its last chunk is heard, as by the original; masked it is not."""
    samples, alone = sound("long", 4100)
    prompt = [*words(2), *samples, *words(3)]
    mask = mx.ones((1, 4100), mx.int32)
    beside = Media({**alone.arrays, "audio_attention_mask": mask}, alone.digests)
    first, second = plain(model, prompt, alone, 1), plain(model, prompt, beside, 1)
    features = [model.encode_media(**media.arrays).audio for media in (alone, beside)]
    assert not np.allclose(np.array(features[0]), np.array(features[1]), atol=1e-4)
    cache = PromptCache(model)
    assert greedy(model, prompt, alone, 1, cache) == first
    computed: list[int] = []
    found = greedy(model, prompt, beside, 1, cache, lambda _, count: computed.append(count))
    assert found == second
    assert set(computed) == {len(prompt) - 2}


def test_a_reply_has_no_slots(model: Phi4MMForCausalLM) -> None:
    drawn: list[mx.array] = []

    class Watching(Sampler):
        def __call__(self, logits: mx.array) -> mx.array:
            drawn.append(logits)
            return super().__call__(logits)

    Engine(model).run_all([Request(words(4), Watching(Sampling(), 0), 3)])
    assert len(drawn) == 3
    for logits in drawn:
        assert logits[0, [IMAGE, AUDIO]].tolist() == [-float("inf")] * 2
        assert mx.isfinite(logits[0, :IMAGE]).all().item()


def test_media_for_a_model_that_takes_text_only() -> None:
    model = load_model(Checkpoint(MINI), mx.float32)
    media = sound("b")[1]
    with pytest.raises(GenerationError) as caught:
        greedy(model, [4, 5], media, 2)
    assert str(caught.value) == "This model takes text only."
    assert caught.value.hint == "phi-4-multimodal sees and hears."


def test_media_that_do_not_fit(model: Phi4MMForCausalLM) -> None:
    (samples, heard), (others, shown) = sound("b"), sound("c", 40)
    fits = [*words(2), *samples, 9, *others]
    cache = PromptCache(model)
    media = together(heard, Media({}, shown.digests))
    reply = greedy(model, words(5), None, 2, cache)
    for prompt, given, message in (
        (
            fits,
            None,
            "The prompt has 15 placeholder tokens for pictures and sounds, but those given fill 0.",
        ),
        (
            fits,
            heard,
            "The prompt has 15 placeholder tokens for pictures and sounds, but those given fill "
            "10.",
        ),
        (
            [*words(2), *others, 9, *samples],
            media,
            "The pictures and sounds given are not in the prompt's order.",
        ),
    ):
        with pytest.raises(PromptError) as caught:
            greedy(model, prompt, given, 2, cache)
        assert str(caught.value) == message
    # What was there before is there still.
    assert cache.tokens == [*words(5), reply[0]]
    assert greedy(model, words(5), None, 2, cache) == reply


def test_rows_of_a_batch_hold_what_they_like(model: Phi4MMForCausalLM) -> None:
    """Each has the adapter that its own media call for."""
    (pixels, first), (samples, second), (others, third) = picture("a"), sound("b"), sound("c", 30)
    prompts: list[tuple[list[int], Media | None]] = [
        ([*words(3), *pixels, *words(2)], first),
        ([*words(3), *samples, *words(40)], second),
        (words(12), None),
        ([*words(1), *others, *words(2)], third),
    ]
    engine = Engine(model)
    requests = [Request(p, Sampler(Sampling(), 0), 4, media=media) for p, media in prompts]
    engine.add(*requests)
    while not all(request.finished for request in requests):
        engine.step()
    expected = [plain(model, prompt, media, 4) for prompt, media in prompts]
    assert [request.reply.tokens for request in requests] == expected


def test_rows_that_hold_what_they_like_join_and_leave(model: Phi4MMForCausalLM) -> None:
    """Each keeps the adapter of its own media; one whose media do not fit ends alone."""
    (pixels, first), (samples, second), (others, third) = picture("a"), sound("b"), sound("c", 30)
    prompts: list[tuple[list[int], Media | None]] = [
        (words(12), None),
        ([*words(3), *pixels, *words(2)], first),
        ([*words(3), *samples, *words(40)], second),
        ([*words(1), *others, *words(2)], third),
        (words(5, 9), None),
    ]
    expected = [plain(model, prompt, media, 8) for prompt, media in prompts]
    engine = Engine(model)
    requests = [Request(p, Sampler(Sampling(), 0), 8, media=media) for p, media in prompts]
    wrong = Request([*words(3), *samples], Sampler(Sampling(), 0), 8, media=third)
    for number, request in enumerate([*requests[:3], wrong, *requests[3:]]):
        engine.add(request)
        if number % 2:
            engine.step()
            engine.step()
    while not all(request.finished for request in requests):
        engine.step()
    assert [request.reply.tokens for request in requests] == expected
    assert isinstance(wrong.error, PromptError)
    assert wrong.reply.tokens == []
