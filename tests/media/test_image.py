"""Crops, masks and token counts, against transformers' processor and published counts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from phimlx.errors import MediaError
from phimlx.media.image import CropLayout, Images, prepare_images
from phimlx.media.limits import Limits
from tests.bundled import present

GOLDENS = Path(__file__).parents[1] / "goldens" / "images"
EXACT = 1e-6  # of −1 to 1, where one of 256 levels is 0.008
SAMPLE = 4993  # of so many values one is kept; a prime, so that no row or crop is left out

SIDES = [(1, 1), (2, 3), (1, 3), (2, 7), (1, 5), (1, 9), (1, 20), (1, 36)]
SHAPES = sorted(
    {
        (side * scale, other * scale)
        for short, long in SIDES
        for scale in (29, 130 // short)
        for side, other in ((short, long), (long, short))
    }
)
WHOLE = [(448, 448), (896, 448), (448, 1344), (1344, 896), (1792, 448)]
LARGE = [(2700, 2700), (5000, 1700), (900, 7000), (17000, 480)]


def synthetic(width: int, height: int) -> np.ndarray:
    """A picture that is the same wherever it is made: slopes with noise, uint8 [h, w, 3]."""
    y, x, c = (axis.astype(np.uint32) for axis in np.ogrid[:height, :width, :3])
    slopes = (x * 255 // max(width - 1, 1) + y * 255 // max(height - 1, 1) * (c + 1)) // 2
    noise = (x * 7919 + y * 104729 + c * 1299709 + x * y * 31) * 2654435761 >> 16 & 127
    return ((slopes + noise) & 255).astype(np.uint8)


def golden(name: str) -> dict[str, np.ndarray]:
    return load_file(GOLDENS / f"{name}.safetensors")


def names(file: str) -> list[str]:
    return sorted({key.rpartition("/")[0] for key in golden(file)})


def assert_equal_to_reference(images: Images, reference: dict[str, np.ndarray], name: str) -> None:
    pixels = images.input_image_embeds.ravel()[::SAMPLE]
    assert images.image_sizes.tolist() == reference[f"{name}/sizes"].tolist()
    assert images.tokens == reference[f"{name}/tokens"].tolist()
    assert images.image_attention_mask.sum(-1).tolist() == reference[f"{name}/mask"].tolist()
    assert pixels.shape == reference[f"{name}/pixels"].shape
    assert np.abs(pixels - reference[f"{name}/pixels"]).max() <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("size", SHAPES + WHOLE + LARGE, ids="{0[0]}x{0[1]}".format)
def test_every_aspect_ratio_is_cut_as_the_reference_cuts_it(size: tuple[int, int]) -> None:
    images = prepare_images([synthetic(*size)])

    assert_equal_to_reference(images, golden("synthetic"), "{}x{}".format(*size))


@pytest.mark.parametrize("name", names("real"))
def test_real_pictures_are_cut_as_the_reference_cuts_them(data: Path, name: str) -> None:
    images = prepare_images([present(data / "images" / name)])

    assert_equal_to_reference(images, golden("real"), name)


def test_several_pictures_are_padded_as_the_reference_pads_them() -> None:
    images = prepare_images([synthetic(448, 448), synthetic(1000, 700), synthetic(30, 90)])

    assert_equal_to_reference(images, golden("several"), "several")
    alone = prepare_images([synthetic(448, 448)])
    assert (images.input_image_embeds[0, :2] == alone.input_image_embeds[0]).all()
    assert not images.input_image_embeds[0, 2:].any()
    assert images.image_attention_mask[0, 2:].all()


def test_grids_are_those_of_the_reference() -> None:
    rows = golden("grids")["grids"]

    assert len(rows) >= 1000
    for width, height, across, down, patches_across, patches_down in rows.tolist():
        layout = CropLayout.of(width, height)
        assert (layout.columns * 448, layout.rows * 448) == (across, down), (width, height)
        assert layout.patches == (patches_down, patches_across), (width, height)


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [(448, 448, 545), (640, 480, 1065), (1920, 1080, 3918), (960, 686, 1745)],
)
def test_published_token_counts(width: int, height: int, tokens: int) -> None:
    assert CropLayout.of(width, height).tokens == tokens


def test_token_counts_of_the_published_oracles(data: Path) -> None:
    oracles = json.loads((data / "golden" / "expected_public_oracles.json").read_text())
    expected = oracles["phi4mm_images"]
    images = prepare_images([present(data / "images" / each["file"]) for each in expected])

    assert images.tokens == [each["num_img_tokens"] for each in expected]
    assert images.image_sizes.tolist() == [each["size_hw"] for each in expected]
    assert list(images.input_image_embeds.shape) == oracles["phi4mm_images_batch_shape"]


def test_token_counts_of_real_prompts(data: Path) -> None:
    prompts = data / "golden" / "real-weights" / "golden" / "multimodal"
    ids = json.loads((prompts / "phi4mm-single-image.json").read_text())["input_ids"]
    images = prepare_images([data / "images" / "pipeline-cat-chonk.jpeg"])

    assert images.tokens == [np.ravel(ids).tolist().count(200010)]


def test_arrays_carry_the_models_names_and_types() -> None:
    arrays = prepare_images([synthetic(500, 300)]).arrays()

    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == {
        "input_image_embeds": ((1, 3, 3, 448, 448), "float32"),
        "image_sizes": ((1, 2), "int64"),
        "image_attention_mask": ((1, 3, 32, 32), "float32"),
    }


def test_digests_tell_pictures_apart_by_size_and_pixels() -> None:
    dark = np.zeros((2, 6, 3), np.uint8)
    images = prepare_images([dark, dark.reshape(6, 2, 3), dark + 1, Image.fromarray(dark)])

    assert images.digests[0] == hashlib.sha256(b"6 2 " + bytes(36)).digest()
    assert images.digests[3] == images.digests[0]
    assert len(set(images.digests)) == 3


def test_a_smaller_grid_can_be_asked_for() -> None:
    assert prepare_images([synthetic(2000, 1000)], dynamic_hd=2).image_sizes.tolist() == [
        [448, 896]
    ]


def test_a_picture_without_a_shorter_side() -> None:
    with pytest.raises(MediaError) as raised:
        prepare_images([np.zeros((9, 448), np.uint8)])

    assert str(raised.value) == (
        "A picture of 448 × 9 pixels is too long: the model would see fewer than 10 pixels of its "
        "shorter side."
    )
    assert raised.value.hint == "Enlarge it or cut it into pieces."


def test_no_picture() -> None:
    with pytest.raises(MediaError, match=r"^There is no picture to prepare\.$"):
        prepare_images([], Limits())
