"""Phi-4-multimodal against the original code's logits, and its parts against the whole.

The oracle is what the published code computed on a tiny checkpoint of the published layout. What it
does not hold (other batches, chunks, later turns) is compared with one pass over the same input.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import PromptError
from phimlx.models.base import CausalLM
from phimlx.models.cache.store import Store
from phimlx.models.features import TEXT, Features
from phimlx.models.lora import LoRALinear, Routing
from phimlx.models.phi4mm.model import Phi4MMForCausalLM

EXACT = 1e-4  # of the largest logit: what the original's own numbers are known to
SAME = 2e-5  # of the largest logit: one computation in another order
IMAGE, AUDIO = 510, 511

Case = dict[str, mx.array]
CASES = ("text", "image", "audio", "both", "two_audio_padded", "audio45s")
MEDIA = (
    "input_image_embeds",
    "image_sizes",
    "image_attention_mask",
    "input_audio_embeds",
    "audio_embed_sizes",
    "audio_attention_mask",
)


@pytest.fixture(scope="module")
def folder(data: Path) -> Path:
    return data / "tiny" / "tiny-phi4mm-remote"


@pytest.fixture(scope="module")
def model(folder: Path) -> Phi4MMForCausalLM:
    return load(folder)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for name, array in mx.load(str(folder / "oracle.safetensors")).items():
        case, _, key = name.partition(".")
        cases.setdefault(case, {})[key] = array
    mx.eval(cases)  # as a thread may have to that is not the one that began to read
    return cases


@pytest.fixture(scope="module")
def features(model: Phi4MMForCausalLM, oracle: dict[str, Case]) -> dict[str, Features]:
    """What the encoders make of each case."""
    found = {name: model.encode_media(**arrays(case)) for name, case in oracle.items()}
    mx.eval([part for case in found.values() for part in case.parts if part is not None])
    return found


@pytest.fixture(scope="module")
def small(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Phi4MMForCausalLM:
    """The same weights with the LongRoPE step at 64 tokens."""
    copy = tmp_path_factory.mktemp("small-step")
    config = json.loads((folder / "config.json").read_text())
    config["original_max_position_embeddings"] = 64
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors").symlink_to(folder / "model.safetensors")
    return load(copy)


def load(folder: Path) -> Phi4MMForCausalLM:
    model = load_model(Checkpoint(folder), mx.float32)
    assert isinstance(model, Phi4MMForCausalLM)
    return model


def arrays(case: Case) -> Case:
    return {name: case[name] for name in MEDIA if name in case}


def difference(found: mx.array, expected: mx.array) -> float:
    """The largest |Δ| over the largest |expected|."""
    assert found.shape == expected.shape
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


def text(count: int, start: int = 3) -> list[int]:
    return [start + (7 * i) % 500 for i in range(count)]


def ids(*tokens: list[int]) -> mx.array:
    return mx.array([[token for part in tokens for token in part]])


# Against the original


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_originals(
    model: Phi4MMForCausalLM, oracle: dict[str, Case], name: str
) -> None:
    case = oracle[name]
    logits = model(case["input_ids"], **arrays(case))
    assert difference(logits[0], case["logits"]) <= EXACT
    assert mx.array_equal(logits[0].argmax(axis=-1), case["logits"].argmax(axis=-1))


@pytest.mark.parametrize(
    ("name", "adapter", "projection"),
    [
        ("text", "vision", None),
        ("image", None, None),
        ("image", "speech", None),
        ("audio", None, "speech"),
        ("audio", "vision", "vision"),
        ("both", "speech", "speech"),
        ("both", "vision", "speech"),
        ("both", None, "vision"),
    ],
)
def test_another_adapter_or_projection_would_be_seen(
    model: Phi4MMForCausalLM,
    oracle: dict[str, Case],
    features: dict[str, Features],
    name: str,
    adapter: str | None,
    projection: str | None,
) -> None:
    """The oracle tells every wrong choice from the right one."""
    case, seen = oracle[name], features[name]
    if seen.audio is not None:
        assert projection is not None
    tokens = case["input_ids"]
    x = model._embed(tokens, (seen,), (projection,))
    forward = model.forward_pass(tokens)
    forward.routing = Routing((adapter,)) if adapter else None
    for layer in model.layers:
        x = layer(x, forward)
    logits = model.head(model.norm(x))
    assert difference(logits[0], case["logits"]) > 100 * EXACT


# With a cache


def test_token_by_token_equals_one_pass(
    model: Phi4MMForCausalLM, oracle: dict[str, Case], features: dict[str, Features]
) -> None:
    case, seen = oracle["audio"], features["audio"]
    tokens, cache, found, used = case["input_ids"], model.make_cache(0, ("speech",)), [], 0
    for place in range(tokens.shape[1]):
        column = tokens[:, place : place + 1]
        new = used + int(column.item() == AUDIO)
        part = seen.between((0, used), (0, new))
        found.append(model.head(model.hidden_states(column, cache, features=part)))
        used = new
    assert difference(mx.concatenate(found, axis=1)[0], case["logits"]) <= EXACT
    assert cache.features[0].audio.shape == seen.audio.shape


@pytest.mark.parametrize("chunk", [1000, 300, 97])
def test_prefill_in_pieces_equals_one_pass(
    model: Phi4MMForCausalLM,
    oracle: dict[str, Case],
    features: dict[str, Features],
    chunk: int,
) -> None:
    case, seen = oracle["both"], features["both"]
    tokens = case["input_ids"]
    cache = model.make_cache(tokens.shape[1], ("vision",))
    found, used = [], (0, 0)
    for begin in range(0, tokens.shape[1], chunk):
        piece = tokens[:, begin : begin + chunk]
        images, audio = model.placeholders.count(np.array(piece))[0]
        end = (used[0] + images, used[1] + audio)
        part = seen.between(used, end)
        found.append(model.head(model.hidden_states(piece, cache, features=part)))
        used = end
    assert difference(mx.concatenate(found, axis=1)[0], case["logits"]) <= EXACT


def test_prefill_in_pieces_without_knowing_the_adapter(
    model: Phi4MMForCausalLM, oracle: dict[str, Case], features: dict[str, Features]
) -> None:
    """The sound comes after the piece with the picture, or before: the last logits are right."""
    case, seen = oracle["both"], features["both"]
    tokens = case["input_ids"]
    first = int((np.array(tokens)[0] == AUDIO).argmax())
    cache = model.make_cache()
    hidden = model.hidden_states(
        tokens[:, :first], cache, features=seen.between((0, 0), (seen.counts[0], 0))
    )
    rest = seen.between((seen.counts[0], 0), seen.counts)
    hidden = model.hidden_states(tokens[:, first:], cache, features=rest)
    assert difference(model.head(hidden)[0], case["logits"][first:]) <= EXACT


def conversation(oracle: dict[str, Case]) -> list[tuple[list[int], Case]]:
    """Text, a sound, text, a picture, text, each turn with the arrays that fill its slots."""
    both = oracle["both"]
    slots = np.array(both["input_ids"])[0]
    picture = {name: both[name] for name in MEDIA[:3]}
    sound = {name: both[name] for name in MEDIA[3:] if name in both}
    return [
        (text(9), {}),
        ([*text(3), *[AUDIO] * int((slots == AUDIO).sum()), *text(4)], sound),
        (text(7, 20), {}),
        ([*text(2), *[IMAGE] * int((slots == IMAGE).sum()), *text(5)], picture),
        (text(6, 40), {}),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["4096", "64"])
def test_a_conversation_equals_recomputing_it(
    model: Phi4MMForCausalLM, small: Phi4MMForCausalLM, oracle: dict[str, Case], step: str
) -> None:
    """A picture that comes late changes the adapter of all that was said, and the projection of all
    that was heard; with the step at 64 the sound's turn crosses it as well."""
    chosen = model if step == "4096" else small
    cache, adapters = chosen.make_cache(), []
    said: list[int] = []
    shown: Case = {}
    for tokens, given in conversation(oracle):
        said, shown = said + tokens, {**shown, **given}
        found = chosen(ids(tokens), cache, **given)
        expected = chosen(ids(said), **shown)[:, -len(tokens) :]
        assert difference(found, expected) <= SAME
        adapters.append(cache.adapters)
    assert adapters == [(None,), ("speech",), ("speech",), ("vision",), ("vision",)]


def test_going_back_before_the_picture(
    model: Phi4MMForCausalLM, oracle: dict[str, Case], features: dict[str, Features]
) -> None:
    """What is left of a trimmed conversation decides again, down to half a sound."""
    cache = model.make_cache()
    said: list[int] = []
    for tokens, given in conversation(oracle):
        said += tokens
        model(ids(tokens), cache, **given)
    for length, adapter in ((len(said) - 11, "vision"), (30, "speech"), (10, None)):
        cache.trim(length)
        kept = [int((np.array(said[:length]) == token).sum()) for token in (IMAGE, AUDIO)]
        assert cache.features[0].counts == tuple(kept)
        seen = features["both"].between((0, 0), (kept[0], kept[1]))
        found = model(ids(text(5, 60)), cache)
        expected = model.head(model.hidden_states(ids(said[:length], text(5, 60)), features=seen))
        assert difference(found, expected[:, -5:]) <= SAME
        assert cache.adapters == (adapter,)
        cache.trim(length)
    cache.trim(0)
    assert cache.features == ()


def test_generating_across_the_step(
    small: Phi4MMForCausalLM, oracle: dict[str, Case], features: dict[str, Features]
) -> None:
    """Sound counts towards LongRoPE's step, and is there again when all is computed anew."""
    case, seen = oracle["audio"], features["audio"]
    tokens, cache = case["input_ids"], small.make_cache()
    small.hidden_states(tokens, cache, features=seen)
    assert cache.long == (False,)
    said = [int(token) for token in tokens[0]]
    for token in text(64 - len(said) + 4):
        said.append(token)
        found = small.head(small.hidden_states(mx.array([[token]]), cache, features=TEXT))
        expected = small.head(small.hidden_states(mx.array([said]), features=seen))
        assert difference(found[:, -1], expected[:, -1]) <= SAME
        assert cache.long == (len(said) > 64,)
    assert len(said) == 68


@pytest.mark.slow
def test_the_real_step_counts_pictures_and_sounds(
    model: Phi4MMForCausalLM, oracle: dict[str, Case], features: dict[str, Features]
) -> None:
    case, seen = oracle["both"], features["both"]
    before = text(4096 - case["input_ids"].shape[1])
    said = mx.concatenate([mx.array([before]), case["input_ids"]], axis=1)
    cache = model.make_cache()
    model.hidden_states(said, cache, features=seen)
    assert (cache.long, cache.adapters) == ((False,), ("vision",))
    last = mx.array([[77]])
    found = model.head(model.hidden_states(last, cache, features=TEXT))
    assert cache.long == (True,)
    whole = model.hidden_states(mx.concatenate([said, last], axis=1), features=seen)
    assert difference(found[:, -1], model.head(whole[:, -1])) <= SAME


# Batches


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [False, True])
def test_rows_with_different_adapters_equal_each_alone(
    model: Phi4MMForCausalLM,
    oracle: dict[str, Case],
    features: dict[str, Features],
    side: str,
    cached: bool,
) -> None:
    names = ("text", "both", "audio", "image", "text", "two_audio_padded")
    rows = [oracle[name]["input_ids"][0] for name in names]
    longest = max(row.size for row in rows)
    pads = [(longest - row.size, 0) if side == "left" else (0, longest - row.size) for row in rows]
    tokens = mx.stack([mx.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
    mask = mx.stack([mx.pad(mx.ones_like(row), pad) for row, pad in zip(rows, pads, strict=True)])
    seen = TEXT
    for name in names:
        seen = seen.then(features[name])
    cache = model.make_cache() if cached else None
    logits = model.head(model.hidden_states(tokens, cache, mask, seen))
    for index, (name, row) in enumerate(zip(names, rows, strict=True)):
        begin = pads[index][0]
        alone = logits[index, begin : begin + row.size]
        assert difference(alone, oracle[name]["logits"]) <= EXACT
    if cache is None:
        return
    assert cache.adapters == (None, "vision", "speech", "vision", None, "speech")
    following = mx.array([text(3, 10 * index) for index in range(1, 7)])
    found = model.head(model.hidden_states(following, cache, features=TEXT))
    for index, (name, row) in enumerate(zip(names, rows, strict=True)):
        whole = mx.concatenate([row, following[index]])[None]
        expected = model.head(model.hidden_states(whole, features=features[name]))[0, -3:]
        assert difference(found[index], expected) <= SAME


def test_one_row_of_a_batch_comes_to_see(
    model: Phi4MMForCausalLM, oracle: dict[str, Case], features: dict[str, Features]
) -> None:
    """Rows change their adapter one by one: all are computed again, each with its own."""
    case, seen = oracle["audio"], features["audio"]
    tokens = case["input_ids"]
    length = tokens.shape[1]
    cache = model.make_cache()
    first = mx.array([text(11), text(11, 5)])
    model.hidden_states(first, cache, features=TEXT)
    second = mx.concatenate([tokens, mx.array([text(length, 9)])])
    found = model.head(model.hidden_states(second, cache, features=seen))
    assert cache.adapters == ("speech", None)
    for row, given in ((0, seen), (1, TEXT)):
        whole = mx.concatenate([first[row], second[row]])[None]
        expected = model.head(model.hidden_states(whole, features=given))[0, -length:]
        assert difference(found[row], expected) <= SAME


# Requests beside each other


def test_requests_in_turn_do_not_disturb_each_other(
    model: Phi4MMForCausalLM, oracle: dict[str, Case], features: dict[str, Features]
) -> None:
    names = ("both", "text", "audio", "image")
    caches = {name: model.make_cache() for name in names}
    said = {name: oracle[name]["input_ids"] for name in names}
    for name in names:
        model.hidden_states(said[name], caches[name], features=features[name])
    for round in range(3):
        for name in names:
            token = mx.array([[30 + round]])
            said[name] = mx.concatenate([said[name], token], axis=1)
            found = model.head(model.hidden_states(token, caches[name], features=TEXT))
            expected = model.head(model.hidden_states(said[name], features=features[name]))
            assert difference(found[:, -1], expected[:, -1]) <= SAME


def test_requests_in_threads_do_not_disturb_each_other(
    model: Phi4MMForCausalLM, oracle: dict[str, Case]
) -> None:
    def run(name: str) -> float:
        case = oracle[name]
        with mx.stream(mx.new_stream(mx.default_device())):
            logits = model(case["input_ids"], **arrays(case))[0]
            return difference(logits, case["logits"])

    names = ("audio", "text", "two_audio_padded", "text") * 2
    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(run, names)) <= EXACT


# Quantized


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_quantized_base_with_live_adapters(
    folder: Path, oracle: dict[str, Case], bits: int, adapters: bool
) -> None:
    """Equals the plain computation with the numbers that the quantized weights stand for."""
    packed, plain = load(folder), load(folder)

    def chosen(path: str, module: nn.Module) -> bool:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 32:
            return False
        return path.endswith("base_layer") or (adapters and ".lora_A." in path)

    nn.quantize(packed, 32, bits, class_predicate=chosen)
    count = 0
    for path, module in packed.named_modules():
        if not isinstance(module, nn.QuantizedLinear):
            continue
        count += 1
        weight = mx.dequantize(module.weight, module.scales, module.biases, 32, bits)
        plain.load_weights([(f"{path}.weight", weight)], strict=False)
    assert count == (8 + 16 if adapters else 8)
    for name in ("text", "audio", "two_audio_padded"):
        case = oracle[name]
        found = packed(case["input_ids"], **arrays(case))
        assert difference(found, plain(case["input_ids"], **arrays(case))) <= SAME
        assert difference(found[0], case["logits"]) > EXACT


@pytest.mark.slow
def test_half_precision_agrees_where_the_margin_is_clear(
    folder: Path, oracle: dict[str, Case]
) -> None:
    half = load_model(Checkpoint(folder), mx.bfloat16)
    for name in ("text", "image", "both", "two_audio_padded"):
        case = oracle[name]
        exact = case["logits"]
        found = half(case["input_ids"], **arrays(case))[0]
        assert found.dtype == mx.bfloat16
        best, second = mx.sort(exact, axis=-1)[:, -1], mx.sort(exact, axis=-1)[:, -2]
        clear = best - second > 2**-5 * mx.abs(exact).max()
        assert clear.sum().item() >= 1
        agree = found.astype(mx.float32).argmax(axis=-1) == exact.argmax(axis=-1)
        assert mx.where(clear, agree, True).all().item()


def test_adapters_are_scaled_and_chosen_by_row() -> None:
    layer = LoRALinear.empty(6, 5, {"a": (2, 1.5), "b": (3, 4.0)})
    shapes = {n: w.shape for n, w in dict(tree_flatten(layer.parameters())).items()}
    assert shapes == {
        "base_layer.weight": (5, 6),
        "lora_A.a.weight": (2, 6),
        "lora_A.b.weight": (3, 6),
        "lora_B.a.weight": (5, 2),
        "lora_B.b.weight": (5, 3),
    }
    x = mx.random.normal((4, 7, 6), key=mx.random.key(1))
    rows = ["b", None, "a", "b"]
    found = layer(x, Routing(rows))
    weights = {n: np.array(w) for n, w in dict(tree_flatten(layer.parameters())).items()}
    for row, name in enumerate(rows):
        weight = weights["base_layer.weight"]
        if name is not None:
            delta = weights[f"lora_B.{name}.weight"] @ weights[f"lora_A.{name}.weight"]
            weight = weight + {"a": 1.5, "b": 4.0}[name] * delta
        assert np.allclose(np.array(found[row]), np.array(x[row]) @ weight.T, atol=1e-5)
    assert mx.array_equal(layer(x), layer.base_layer(x))


# What does not fit


def test_slots_and_features_must_be_as_many(
    model: Phi4MMForCausalLM, oracle: dict[str, Case], features: dict[str, Features]
) -> None:
    tokens = oracle["both"]["input_ids"]
    images, audio = features["both"].counts
    calls: list[tuple[str, Callable[[], Any]]] = [
        (
            f"The input has {images} image placeholders, but the image features given fill 0.",
            lambda: model(tokens),
        ),
        (
            f"The input has {audio} audio placeholders, but the audio features given fill 0.",
            lambda: model.hidden_states(
                tokens, features=features["both"].between((0, 0), (images, 0))
            ),
        ),
        (
            f"The input has {audio - 1} audio placeholders, but the audio features given fill "
            f"{audio}.",
            lambda: model.hidden_states(
                ids([IMAGE] * images, [AUDIO] * (audio - 1)), features=features["both"]
            ),
        ),
        (
            f"The input has 0 audio placeholders, but the audio features given fill {audio}.",
            lambda: model.hidden_states(
                ids(text(4)), features=features["both"].between((images, 0), (images, audio))
            ),
        ),
        (
            "The input has 1 image placeholders, but the image features given fill 0.",
            lambda: model(mx.array([[IMAGE]]), model.make_cache()),
        ),
    ]
    for message, call in calls:
        with pytest.raises(PromptError) as caught:
            call()
        assert str(caught.value) == message


def test_arrays_that_lack_their_sizes(model: Phi4MMForCausalLM, oracle: dict[str, Case]) -> None:
    both = oracle["both"]
    for name, beside in (
        ("image_sizes", "input_image_embeds"),
        ("audio_embed_sizes", "input_audio_embeds"),
    ):
        with pytest.raises(PromptError) as caught:
            model(both["input_ids"], **{k: v for k, v in arrays(both).items() if k != name})
        assert str(caught.value) == f"{beside} comes without {name}."


def test_empty_arrays_mean_no_media(model: Phi4MMForCausalLM, oracle: dict[str, Case]) -> None:
    """As the published processor gives them beside a text; numpy's arrays do as well."""
    case = oracle["text"]
    empty = {name: np.zeros((0,), np.float32) for name in MEDIA}
    assert difference(model(case["input_ids"], **empty)[0], case["logits"]) <= EXACT
    case = oracle["audio"]
    given = {name: np.array(array) for name, array in arrays(case).items()}
    assert difference(model(case["input_ids"], **given)[0], case["logits"]) <= EXACT


def test_a_picture_without_a_mask_is_whole(model: Phi4MMForCausalLM) -> None:
    pixels = mx.random.normal((1, 2, 3, 448, 448), key=mx.random.key(0))
    sizes = mx.array([[448, 448]])
    bare = model.encode_media(input_image_embeds=pixels, image_sizes=sizes)
    masked = model.encode_media(
        input_image_embeds=pixels,
        image_sizes=sizes,
        image_attention_mask=mx.ones((1, 2, 32, 32)),
    )
    assert bare.counts == (545, 0)
    assert mx.array_equal(bare.images, masked.images)


def test_a_cache_of_another_kind(model: Phi4MMForCausalLM) -> None:
    cache = CausalLM._make_cache(model, Store(0))
    with pytest.raises(TypeError, match="a multimodal model's cache comes from its own make_cache"):
        model(ids(text(3)), cache)
