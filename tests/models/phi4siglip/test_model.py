"""Phi-4-reasoning-vision against the original code's logits, and its parts against the whole.

The oracle is what Microsoft's code computed on a tiny checkpoint of the published layout. What it
does not hold (other batches, chunks, later turns) is compared with one pass over the same input.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, load_model
from phimlx.errors import ConfigError, MediaError, PromptError
from phimlx.generation.prefill import prefill
from phimlx.models import siglip
from phimlx.models.features import Features
from phimlx.models.phi4siglip.model import Phi4SiglipForCausalLM, spliced
from phimlx.models.phi4siglip.vision import interpolation
from tests.reasoning_vision import IMAGE, TINY, media

EXACT = 3e-5  # of the largest logit; what tells a right port from a nearly right one
SAME = 1e-5  # of the largest logit: one computation in another order
CASES = (
    *("text", "small", "wide", "two", "batch"),
    pytest.param("large", marks=pytest.mark.slow),
)

Arrays = dict[str, mx.array]


@pytest.fixture(scope="module")
def model(data: Path) -> Phi4SiglipForCausalLM:
    return load(data)


@pytest.fixture(scope="module")
def oracle(data: Path) -> Arrays:
    arrays = mx.load(str(data / TINY / "oracle.safetensors"))
    assert isinstance(arrays, dict)
    return arrays


@pytest.fixture(scope="module")
def pictures(data: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads((data / TINY / "cases.json").read_text())
    return found


def load(data: Path) -> Phi4SiglipForCausalLM:
    model = load_model(Checkpoint(data / TINY), mx.float32)
    assert isinstance(model, Phi4SiglipForCausalLM)
    return model


def away(found: mx.array, expected: mx.array) -> float:
    """The largest difference, in parts of the largest value."""
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


def tokens(*values: int) -> mx.array:
    return mx.array([values], dtype=mx.int32)


@pytest.mark.parametrize("case", CASES)
def test_logits(
    data: Path, model: Phi4SiglipForCausalLM, oracle: Arrays, pictures: dict[str, Any], case: str
) -> None:
    shown = media(data, pictures[case]) if pictures[case] else {}
    ids, mask = oracle[f"{case}.input_ids"], oracle.get(f"{case}.attention_mask")
    logits = model(ids.astype(mx.int32), attention_mask=mask, **shown)
    expected, rows = oracle[f"{case}.logits"], oracle[f"{case}.rows"]
    found = logits[:, rows] if expected.ndim == 3 else logits[0, rows]
    assert away(found, expected) <= EXACT


@pytest.mark.parametrize("name", ["small", "tall", "wide"])
def test_features(data: Path, model: Phi4SiglipForCausalLM, oracle: Arrays, name: str) -> None:
    if f"shared.{name}.features" not in oracle:
        pytest.skip("features do not travel with the tests: set PHIMLX_TEST_DATA")
    found = model.encode_media(**media(data, [name])).images
    assert found is not None
    assert away(found, oracle[f"shared.{name}.features"]) <= EXACT


def test_a_picture_alone_is_what_it_is_beside_others(
    data: Path, model: Phi4SiglipForCausalLM
) -> None:
    """Padding is neither attended to nor handed on."""
    both = model.encode_media(**media(data, ["wide", "small"])).images
    alone = [model.encode_media(**media(data, [name])).images for name in ("wide", "small")]
    assert both is not None
    assert away(both, mx.concatenate(alone)) <= SAME


@pytest.mark.parametrize("size", [1, 7, 100])
def test_attention_a_few_patches_at_a_time(
    data: Path, model: Phi4SiglipForCausalLM, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    shown = media(data, ["wide"])
    monkeypatch.setattr(siglip, "queries_at_once", lambda: 1 << 16)
    whole = model.encode_media(**shown).images
    monkeypatch.setattr(siglip, "queries_at_once", lambda: size)
    parts = model.encode_media(**shown).images
    assert whole is not None
    assert parts is not None
    assert away(parts, whole) <= SAME


@pytest.mark.parametrize("chunk", [50, 252, 300])
def test_a_prompt_in_pieces(data: Path, model: Phi4SiglipForCausalLM, chunk: int) -> None:
    shown = media(data, ["small"])
    whole = model(tokens(3, IMAGE, 9, 17, 4), **shown)[0, -3:]
    ids = np.array([[3, *[IMAGE] * 252, 9, 17, 4]])
    cache = model.make_cache()
    features = [model.encode_media(**shown)]
    pieces = prefill(model, ids, cache, features=features, size=chunk, outputs=1)
    *_, last = pieces
    assert away(model.head(last)[0], whole[-1:]) <= SAME
    later = model(tokens(21), cache)
    again = model(tokens(3, IMAGE, 9, 17, 4, 21), **shown)
    assert away(later[0], again[0, -1:]) <= SAME


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch(data: Path, model: Phi4SiglipForCausalLM, side: str) -> None:
    """Each is what it is alone, whatever stands beside it and on which side it is padded."""
    rows = [[5, IMAGE, 8], [40, 41, 42, 43, 44, 45], [IMAGE, 7, IMAGE]]
    longest = max(map(len, rows))
    ids, mask = np.full((len(rows), longest), 511), np.zeros((len(rows), longest), np.int32)
    for row, own in enumerate(rows):
        place = slice(longest - len(own), longest) if side == "left" else slice(len(own))
        ids[row, place], mask[row, place] = own, 1
    names = ["wide", "small", "tall"]
    logits = model(mx.array(ids), attention_mask=mx.array(mask), **media(data, names))
    for row, (own, shown) in enumerate(zip(rows, ([0], [], [1, 2]), strict=True)):
        arrays = media(data, [names[i] for i in shown]) if shown else {}
        alone = model(mx.array([own]), **arrays)[0]
        assert away(logits[row, : len(alone)], alone) <= SAME


def test_a_long_row_with_pictures_is_cut(data: Path, model: Phi4SiglipForCausalLM) -> None:
    """As the original cuts it, in the middle of a picture too; rows beside it stay."""
    shown = media(data, ["small", "wide"])
    prompt = tokens(3, IMAGE, 9, IMAGE, 4)
    whole = model(prompt, **shown)
    assert whole.shape[1] == 252 + 216 + 3
    for longest in (252 + 216 + 2, 300, 100):
        model.longest_with_media = longest
        try:
            logits = model(prompt, **shown)
        finally:
            model.longest_with_media = 8192
        assert logits.shape[1] == longest
        assert away(logits, whole[:, :longest]) <= SAME


def test_places_of_pictures() -> None:
    ids = np.array([[1, IMAGE, 2], [IMAGE, IMAGE, 3]])
    assert spliced(ids, None, [2, 1, 3], None) == (
        [[1, IMAGE, IMAGE, 2], [IMAGE] * 4 + [3]],
        [0, 1, 2, 3, 4, 5],
    )
    assert spliced(ids, None, [2, 1, 3], 3) == ([[1, IMAGE, IMAGE], [IMAGE] * 3], [0, 1, 2, 3, 4])
    mask = np.array([[False, True, True], [True, False, True]])
    assert spliced(ids, mask, [2, 1], None) == (
        [[IMAGE, IMAGE, 2], [IMAGE, 3]],
        [0, 1, 2],
    )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_places_as_pictures(data: Path, model: Phi4SiglipForCausalLM, count: int) -> None:
    with pytest.raises(PromptError) as caught:
        model(tokens(5, *[IMAGE] * count, 6), **media(data, ["wide", "small"]))
    places = "1 place" if count == 1 else f"{count} places"
    assert str(caught.value) == f"The input has {places} for pictures, but 2 pictures are given."


def test_a_place_without_a_picture(model: Phi4SiglipForCausalLM) -> None:
    with pytest.raises(PromptError) as caught:
        model(tokens(5, IMAGE, 6))
    assert str(caught.value) == (
        "The input has 1 image placeholders, but the image features given fill 0."
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spatial_shapes": None}, "pixel_values comes without spatial_shapes."),
        (
            {"spatial_shapes": mx.array([[6, 37]])},
            "Picture 1 has 6 × 37 patches by spatial_shapes, which does not fit its patches and "
            "their mask.",
        ),
        (
            {"spatial_shapes": mx.array([[6, 35]])},
            "Picture 1 has 6 × 35 patches by spatial_shapes, which does not fit its patches and "
            "their mask.",
        ),
        (
            {"spatial_shapes": mx.array([[-6, -36]])},
            "Picture 1 has -6 × -36 patches by spatial_shapes, which does not fit its patches and "
            "their mask.",
        ),
        (
            {"spatial_shapes": mx.array([6, 36])},
            "spatial_shapes has the shape [2], not [1, 2].",
        ),
        (
            {"pixel_values": mx.zeros((1, 216, 700))},
            "A patch has 700 numbers, but the model takes 768.",
        ),
    ],
)
def test_arrays_that_no_picture_has(
    data: Path, model: Phi4SiglipForCausalLM, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((PromptError, MediaError)) as caught:
        model.encode_media(**{**media(data, ["wide"]), **changes})
    assert str(caught.value) == message


def test_empty_arrays_mean_no_pictures(model: Phi4SiglipForCausalLM) -> None:
    empty = {"pixel_values": mx.zeros((0, 0, 768)), "spatial_shapes": mx.zeros((0, 2))}
    assert model.encode_media(**empty) == Features()
    assert away(model(tokens(4, 5), **empty), model(tokens(4, 5))) == 0


def test_pictures_lie_on_the_grid_of_positions_as_torch_lays_them() -> None:
    """0 … 3 by torch.nn.functional.interpolate, antialiased, with half-pixel centres."""
    ramp = np.arange(4, dtype=np.float32)
    for length, expected in (
        (4, [0, 1, 2, 3]),
        (8, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]),
        (2, [0.71428573, 2.2857144]),
        (1, [1.5]),
        (3, [0.3, 1.5, 2.7]),
    ):
        np.testing.assert_allclose(interpolation(4, length) @ ramp, expected, atol=1e-6)


def test_half_precision_stays_near(data: Path, model: Phi4SiglipForCausalLM) -> None:
    shown = media(data, ["small"])
    half = load_model(Checkpoint(data / TINY), mx.bfloat16)
    prompt = tokens(3, IMAGE, 9, 17)
    assert away(half(prompt, **shown).astype(mx.float32), model(prompt, **shown)) < 0.05


def test_what_is_stored_and_not_used(data: Path, model: Phi4SiglipForCausalLM) -> None:
    """The last layer of the tower, its norm and its pooling head."""
    stored = set(Checkpoint(data / TINY).tensors)
    left = stored - set(dict(tree_flatten(model.parameters())))
    vision = "model.vision_tower.vision_tower.vision_model."
    assert {name.removeprefix(vision).split(".")[0] for name in left} == {
        "encoder", "head", "post_layernorm"
    }  # fmt: skip
    assert {name for name in left if "encoder" in name} == {
        name for name in stored if "encoder.layers.2." in name
    }


VISION = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vision_config": {**VISION, "hidden_act": "relu"}},
            "vision_config.hidden_act is 'relu', but Phi-4-reasoning-vision has "
            "'gelu_pytorch_tanh' here.",
        ),
        (
            {"vision_config": {**VISION, "num_attention_heads": 5}},
            "vision_config.hidden_size (48) is not a multiple of 5.",
        ),
        (
            {"vision_config": {**VISION, "num_patches": 200}},
            "vision_config.num_patches is 200, not the square of a whole number.",
        ),
        (
            {"vision_config": {**VISION, "num_hidden_layers": 1}},
            "vision_config.num_hidden_layers is 1, not 2 or more.",
        ),
        ({"vision_config": 3}, "vision_config is 3, not a table of values."),
        (
            {"mm_projector_type": "linear"},
            "mm_projector_type is 'linear', but Phi-4-reasoning-vision has 'mlp2x_gelu' here.",
        ),
        (
            {"mm_hidden_size": 49},
            "mm_hidden_size is 49, but Phi-4-reasoning-vision has 48 here.",
        ),
        (
            {"tokenizer_model_max_length": -1},
            "tokenizer_model_max_length is -1, not a whole number from 1 to 65536.",
        ),
        (
            {"max_num_patches": True},
            "max_num_patches is True, not a whole number from 1 to 65536.",
        ),
    ],
)
def test_a_config_that_cannot_be(data: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((data / TINY / "config.json").read_text())
    with pytest.raises(ConfigError) as caught:
        build_model({**config, **change})
    assert str(caught.value) == f"config.json: {message}"


def test_the_published_shape(data: Path) -> None:
    config = json.loads((data / "hf/Phi-4-reasoning-vision-15B/config.json").read_text())
    model = build_model(config)
    assert isinstance(model, Phi4SiglipForCausalLM)
    assert (model.config.vision.side, model.config.vision.patch_size) == (16, 16)
    assert (model.longest_with_media, model.config.max_num_patches) == (8192, 3600)
    assert len(model.model.vision_tower.vision_tower["vision_model"].encoder.layers) == 26
