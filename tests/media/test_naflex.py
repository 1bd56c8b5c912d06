"""Patches as the published processor makes them: grids, pixels, and settings that cannot be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from phimlx.errors import ConfigError, MediaError
from phimlx.media.limits import Limits
from phimlx.media.naflex import image_processor, patch_grid, prepare_patches
from tests.reasoning_vision import PUBLISHED, TINY, picture

# SHA-256 of the patches that the original made of the tiny checkpoint's pictures.
ORIGINALS = {
    "small": "1ebf98edcaa1d77b2d080f63ce7f28922b2f30e895d2d71d79a139e3ab247b1a",
    "large": "f1bc0d4eba82ad898535464b0954219aa9d542383499c51f537cdc477355ec19",
    "tall": "6c8c3d90add63a7c205d0f795a25fbd81d7523cf5baea95c245b7e73c6e3d843",
    "wide": "cc80d92004bcabc24b03b6a36afd819eaa31d558362f0126f8368746d7ba1a33",
}


def test_grids_are_the_originals(data: Path) -> None:
    for each in json.loads((data / "golden" / "phi4rv_sizes.json").read_text()):
        grid = patch_grid(each["width"], each["height"])
        assert grid == (each["patches_h"], each["patches_w"]), each
        assert each["resized_to"] == [16 * grid[1], 16 * grid[0]]


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [
        (200, 150, 252), (1000, 600, 2294), (224, 224, 256), (64, 64, 256), (16, 16, 256),
        (320, 240, 300), (600, 100, 216), (640, 480, 1200), (800, 600, 1850), (960, 960, 3600),
        (1024, 768, 3072), (1280, 720, 3600), (1920, 1080, 3600), (3840, 2160, 3600),
        (4000, 3000, 3588), (1344, 896, 3577), (100, 1000, 360), (30, 2000, 256),
    ],
)  # fmt: skip
def test_tokens_are_the_originals(width: int, height: int, tokens: int) -> None:
    rows, columns = patch_grid(width, height)
    assert rows * columns == tokens


@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_grids_stay_within_their_bounds(width: int, height: int) -> None:
    rows, columns = patch_grid(width, height)
    assert 1 <= rows * columns <= max(256, min(3600, (width // 16) * (height // 16)))


@pytest.mark.parametrize("name", ORIGINALS)
def test_patches_are_the_originals_to_the_last_bit(data: Path, name: str) -> None:
    patches = prepare_patches([data / TINY / "pictures" / f"{name}.png"])
    assert patches.pixel_attention_mask.all()
    assert hashlib.sha256(patches.pixel_values.tobytes()).hexdigest() == ORIGINALS[name]


def test_pictures_of_several_sizes(data: Path) -> None:
    sources = [picture(1, 100, 300), picture(2, 400, 200)]
    both = prepare_patches(sources)
    assert both.tokens == [prepare_patches([each]).tokens[0] for each in sources]
    assert both.pixel_attention_mask.sum(axis=1).tolist() == both.tokens
    assert both.pixel_values.shape == (2, max(both.tokens), 768)
    for row, source in enumerate(sources):
        alone = prepare_patches([source])
        own = both.pixel_values[row, : both.tokens[row]]
        assert (own == alone.pixel_values[0]).all()
        assert not both.pixel_values[row, both.tokens[row] :].any()
        assert both.digests[row] == alone.digests[0]


@pytest.mark.parametrize("size", [(1, 90), (90, 1), (3, 200), (1, 1), (5, 4)])
def test_pictures_of_a_few_pixels(size: tuple[int, int]) -> None:
    """The original takes a side of 1 or 3 pixels for channels; here it is a picture."""
    patches = prepare_patches([picture(0, *size)])
    assert 0 < patches.tokens[0] <= 256
    assert np.abs(patches.pixel_values).max() <= 1


def test_forms_of_one_picture() -> None:
    grey = np.full((40, 60), 128, np.uint8)
    colour = np.stack([grey] * 3, axis=-1)
    made = prepare_patches([grey, colour, Image.fromarray(colour)])
    assert (made.pixel_values == made.pixel_values[:1]).all()
    assert np.ptp(made.pixel_values[0]) == 0
    assert made.pixel_values[0, 0, 0] == pytest.approx(128 / 127.5 - 1, abs=1e-6)


def test_limits_hold() -> None:
    with pytest.raises(MediaError):
        prepare_patches([picture()], Limits(max_pixels=100))
    with pytest.raises(MediaError, match="no picture"):
        prepare_patches([])


def test_published_settings(data: Path) -> None:
    settings = json.loads((data / PUBLISHED / "preprocessor_config.json").read_text())
    either: tuple[dict[str, Any], ...] = (settings, {})
    for given_settings in either:
        made = image_processor(given_settings)([picture(3, 640, 480)], None)
        assert made.tokens == [1200]
    fewer = image_processor({**settings, "max_num_patches": 300})([picture(3, 640, 480)], None)
    assert fewer.tokens == [300]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 14}, "patch_size is 14, but Phi-4-reasoning-vision has 16 here."),
        ({"resample": 3}, "resample is 3, but Phi-4-reasoning-vision has 2 here."),
        ({"max_num_patches": 0}, "max_num_patches is 0; it must be from 1 to 65536."),
        ({"max_num_patches": "9"}, "max_num_patches is '9'; it must be from 1 to 65536."),
        ({"min_num_patches": 9999}, "min_num_patches is above max_num_patches."),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        image_processor(change)
    assert str(caught.value) == f"preprocessor_config.json: {message}"
