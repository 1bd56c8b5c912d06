"""Features of images against transformers', for every shape of crop grid and padding.

The goldens are made by `scripts/goldens/encoder_goldens.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phimlx.errors import ConfigError, MediaError
from phimlx.models.phi4mm.vision import (
    ImageEmbedding,
    ImageLayout,
    VisionConfig,
    buckets,
    image_layouts,
)

GOLDEN = Path(__file__).parents[2] / "goldens" / "encoders" / "vision.safetensors"
ARRAYS, METADATA = mx.load(str(GOLDEN), return_metadata=True)
CONFIG = json.loads(METADATA["config"])
CASES = json.loads(METADATA["cases"])


def embedding(dtype: mx.Dtype = mx.float32) -> ImageEmbedding:
    module = ImageEmbedding(VisionConfig.from_dict(CONFIG), CONFIG["hidden_size"])
    module.load_weights(
        [
            (name.removeprefix("weights."), array.astype(dtype))
            for name, array in ARRAYS.items()
            if name.startswith("weights.")
        ]
    )
    return module


def inputs(case: str) -> dict[str, mx.array]:
    crops = ARRAYS["crops"].astype(mx.float32) / 127.5 - 1
    return {
        "input_image_embeds": crops[ARRAYS[f"{case}.chosen"]],
        "image_attention_mask": ARRAYS[f"{case}.image_attention_mask"].astype(mx.float32),
        "image_sizes": ARRAYS[f"{case}.image_sizes"].astype(mx.int64),
    }


def layouts(batch: dict[str, mx.array]) -> list[ImageLayout]:
    masks, sizes = (np.array(batch[name]) for name in ("image_attention_mask", "image_sizes"))
    return image_layouts(masks, sizes, VisionConfig.from_dict(CONFIG))


def encode(module: ImageEmbedding, batch: dict[str, mx.array]) -> list[mx.array]:
    return module(batch["input_image_embeds"], layouts(batch))


def difference(found: mx.array, expected: mx.array) -> float:
    """Relative to the largest expected value."""
    assert found.shape == expected.shape
    largest = mx.abs(expected).max()
    return float((mx.abs(found.astype(mx.float32) - expected).max() / largest).item())


@pytest.mark.parametrize("case", CASES)
def test_rows_equal_the_reference(case: str) -> None:
    rows = encode(embedding(), inputs(case))
    assert [len(picture) for picture in rows] == np.array(ARRAYS[f"{case}.tokens"]).tolist()
    assert difference(mx.concatenate(rows), ARRAYS[f"{case}.rows"]) < 1e-5


@pytest.mark.parametrize(("dtype", "allowed"), [(mx.bfloat16, 0.03), (mx.float16, 0.005)])
def test_half_precision_is_near(dtype: mx.Dtype, allowed: float) -> None:
    rows = mx.concatenate(encode(embedding(dtype), inputs("mixed")))
    assert rows.dtype == dtype
    assert difference(rows, ARRAYS["mixed.rows"]) < allowed


def test_pictures_do_not_see_each_other() -> None:
    module, batch = embedding(), inputs("mixed")
    together = encode(module, batch)
    for i, rows in enumerate(together):
        alone = encode(module, {name: array[i : i + 1] for name, array in batch.items()})
        assert difference(alone[0], rows) < 1e-6


def test_padding_is_never_seen() -> None:
    """Whatever stands in patches that are padding, and in crops that are, changes nothing."""
    batch = inputs("empty_crops")
    expected = encode(embedding(), batch)[0]
    seen = np.kron(np.array(batch["image_attention_mask"]), np.ones((2, 2)))  # patches of 2 × 2
    assert 0 < seen[0, 1].mean() < 1
    assert seen[0, 2:].sum() == 0
    noisy = mx.where(mx.array(seen)[:, :, None] > 0, batch["input_image_embeds"], 7.0)
    # A patch beside an odd edge is pooled with the edge, and so is seen; this one's are even.
    found = encode(embedding(), {**batch, "input_image_embeds": noisy})[0]
    assert difference(found, expected) == 0


def test_parameters_carry_the_published_names(data: Path) -> None:
    folder = data / "tiny" / "tiny-phi4mm-remote"
    config = json.loads((folder / "config.json").read_text())
    prefix = "model.embed_tokens_extend.image_embed."
    weights: Any = mx.load(str(folder / "model.safetensors"))
    stored = {
        name.removeprefix(prefix): array.shape
        for name, array in weights.items()
        if name.startswith(prefix)
    }
    module = ImageEmbedding(VisionConfig.from_dict(config), config["hidden_size"])
    parameters: Any = tree_flatten(module.parameters())
    ours = {name: array.shape for name, array in parameters}
    assert ours.items() <= stored.items()
    unused = {name.removeprefix("img_processor.").split(".")[0] for name in stored.keys() - ours}
    assert unused == {"encoder", "head", "post_layernorm"}
    last = {name for name in stored.keys() - ours if ".encoder." in name}
    assert all(name.startswith("img_processor.encoder.layers.2.") for name in last)


def test_whole_crop_has_every_position() -> None:
    assert buckets(32, 32).tolist() == list(range(32))


def test_positions_of_part_of_a_crop_are_the_reference_s() -> None:
    """`torch.bucketize(torch.arange(n) * (1 / n), torch.arange(1 / 32, 1, 1 / 32), right=True)`."""
    assert buckets(1, 32).tolist() == [0]
    assert buckets(3, 32).tolist() == [0, 10, 21]
    assert buckets(24, 32).tolist() == [
        0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18, 20, 21, 22, 24, 25, 26, 28, 29, 30,
    ]  # fmt: skip


def test_published_shape_stands_where_the_config_has_none(data: Path) -> None:
    folder = data / "hf" / "Phi-4-multimodal-instruct"
    config = VisionConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert asdict(config) == {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 448,
    }
    assert config.side == 32


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ([1], "config.json: vision_config is [1], not a table of values."),
        (
            {"hidden_size": "wide"},
            "config.json: vision_config.hidden_size is 'wide', not a whole number from 1 to 65536.",
        ),
        (
            {"num_hidden_layers": True},
            "config.json: vision_config.num_hidden_layers is True, not a whole number from 1 to "
            "65536.",
        ),
        (
            {"hidden_act": "relu"},
            "config.json: vision_config.hidden_act is 'relu', but Phi-4-multimodal has "
            "'gelu_pytorch_tanh' here.",
        ),
        (
            {"crop_size": 336},
            "config.json: vision_config.crop_size is 336, but Phi-4-multimodal has 448 here.",
        ),
        (
            {"num_attention_heads": 7},
            "config.json: vision_config.hidden_size (1152) is not a multiple of 7.",
        ),
        (
            {"patch_size": 64},
            "config.json: vision_config.image_size (448) is not a multiple of 128.",
        ),
    ],
)
def test_impossible_configs(vision: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        VisionConfig.from_dict({"vision_config": vision})
    assert str(error.value) == message


def test_arrays_that_no_picture_has() -> None:
    batch = inputs("corner")
    with pytest.raises(MediaError) as error:
        layouts({**batch, "image_sizes": mx.array([[64, 512]])})
    assert str(error.value) == (
        "Picture 1 is 64 × 512 pixels by image_sizes, which does not fit its 5 crops."
    )
    assert error.value.hint == "The arrays must come from one call of the processor."
    hole = np.array(batch["image_attention_mask"])
    hole[0, 1, 5, 5] = 0
    outside = np.array(batch["image_attention_mask"])
    outside[0, 4, 31, 31] = 1
    partial = np.array(batch["image_attention_mask"])
    partial[0, 0, 31] = 0
    nothing = np.zeros_like(hole)
    nothing[0, 0] = 1
    for mask in (hole, outside, partial, nothing):
        with pytest.raises(MediaError) as error:
            layouts({**batch, "image_attention_mask": mx.array(mask)})
        assert str(error.value) == (
            "The attention mask of picture 1 is not a whole global view and a picture with padding "
            "to its right and below."
        )
