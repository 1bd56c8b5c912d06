"""Images as Phi-4-reasoning-vision was trained on them: patches of their own size and ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from phimlx.errors import ConfigError, MediaError, shortened
from phimlx.media.image import image_digest
from phimlx.media.image_file import ImageSource, load_image
from phimlx.media.limits import Limits

if TYPE_CHECKING:
    from PIL.Image import Image

Array = np.ndarray[Any, Any]

# The published preprocessor_config.json.
PATCH_SIZE, MIN_PATCHES, MAX_PATCHES = 16, 256, 3600
FIXED: dict[str, Any] = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
    "resample": 2,
    "patch_size": PATCH_SIZE,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
}
MOST_PATCHES = 1 << 16  # that a config may ask for

SMALLEST_SCALE, LARGEST_SCALE, PRECISION = 1e-6, 100.0, 1e-5


@dataclass(frozen=True)
class Patches:
    """Image inputs of the model, padded to the image with most patches.

    Attributes:
        pixel_values: float32 [images, longest, 768], −1 to 1; row by row, each patch by rows,
            columns and channels; 0 where an image has fewer.
        pixel_attention_mask: int32 [images, longest], 1 where there is a patch.
        spatial_shapes: int64 [images, 2], rows and columns of patches.
        digests: SHA-256 of each picture's size and RGB pixels.
    """

    pixel_values: Array
    pixel_attention_mask: Array
    spatial_shapes: Array
    digests: list[bytes]

    @property
    def tokens(self) -> list[int]:
        """Tokens that each picture fills in the prompt: one a patch."""
        return [int(rows * columns) for rows, columns in self.spatial_shapes]

    def arrays(self) -> dict[str, Array]:
        """Return the model's inputs, under its own names."""
        return {
            "pixel_values": self.pixel_values,
            "pixel_attention_mask": self.pixel_attention_mask,
            "spatial_shapes": self.spatial_shapes,
        }


def image_processor(settings: Mapping[str, Any]) -> Callable[..., Patches]:
    """Make what prepares images for a checkpoint; see `Architecture.prepare_images`."""
    for key, only in FIXED.items():
        if settings.get(key) not in (None, only):
            raise ConfigError(
                f"preprocessor_config.json: {key} is {shortened(settings[key])}, but "
                f"Phi-4-reasoning-vision has {only} here."
            )
    least = _read_count(settings, "min_num_patches", MIN_PATCHES)
    most = _read_count(settings, "max_num_patches", MAX_PATCHES)
    if least > most:
        raise ConfigError("preprocessor_config.json: min_num_patches is above max_num_patches.")
    return partial(prepare_patches, min_num_patches=least, max_num_patches=most)


def _read_count(settings: Mapping[str, Any], key: str, usual: int) -> int:
    value: Any = settings.get(key)
    value = usual if value is None else value
    if type(value) is not int or not 1 <= value <= MOST_PATCHES:
        raise ConfigError(
            f"preprocessor_config.json: {key} is {shortened(value)}; it must be from 1 to "
            f"{MOST_PATCHES}."
        )
    return value


def prepare_patches(
    sources: Sequence[ImageSource],
    limits: Limits | None = None,
    *,
    min_num_patches: int = MIN_PATCHES,
    max_num_patches: int = MAX_PATCHES,
) -> Patches:
    """Read images and cut them into patches as the model was trained on them.

    The arrays are those of processing_phi4_visionr.py in microsoft/Phi-4-reasoning-vision-15B:
    resized by Pillow's bilinear filter to whole patches, and by no more than that asks for.

    Args:
        min_num_patches, max_num_patches: of one picture, from preprocessor_config.json. Rounding
            may leave a few less.

    Raises:
        MediaError: there is no picture, or one cannot be read (see `load_image`).
    """
    if not sources:
        raise MediaError("There is no picture to prepare.")
    found, grids, digests = [], [], []
    for source in sources:
        image = load_image(source, limits)
        grids.append(patch_grid(*image.size, min_num_patches, max_num_patches))
        found.append(_patches(image, grids[-1]))
        digests.append(image_digest(image))
    longest = max(map(len, found))
    values = np.zeros((len(found), longest, 3 * PATCH_SIZE**2), np.float32)
    mask = np.zeros((len(found), longest), np.int32)
    for row, patches in enumerate(found):
        values[row, : len(patches)] = patches
        mask[row, : len(patches)] = 1
    return Patches(values, mask, np.array(grids, np.int64), digests)


def patch_grid(
    width: int, height: int, least: int = MIN_PATCHES, most: int = MAX_PATCHES
) -> tuple[int, int]:
    """Choose rows and columns of patches for an image of so many pixels.

    The whole patches that it holds, from `least` to `most`, are not exceeded; the scale is sought
    by halving, as transformers does (`image_processing_siglip2.py`).
    """
    allowed = max(least, min(most, (height // PATCH_SIZE) * (width // PATCH_SIZE)))
    low, high = SMALLEST_SCALE, LARGEST_SCALE
    while high - low >= PRECISION:
        scale = (low + high) / 2
        rows, columns = (_patches_along(side, scale) for side in (height, width))
        if rows * columns <= allowed:
            low = scale
        else:
            high = scale
    return _patches_along(height, low), _patches_along(width, low)


def _patches_along(side: int, scale: float) -> int:
    return max(1, math.ceil(side * scale / PATCH_SIZE))


def _patches(image: Image, grid: tuple[int, int]) -> Array:
    """The resized image as float32 [patches, 768]."""
    from PIL.Image import Resampling

    rows, columns = grid
    size = (columns * PATCH_SIZE, rows * PATCH_SIZE)
    pixels = np.asarray(image.resize(size, Resampling.BILINEAR))
    pixels = pixels.reshape(rows, PATCH_SIZE, columns, PATCH_SIZE, 3)
    return _VALUES[pixels.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)]


# 0 to 255 → −1 to 1, by the original's own steps and roundings (mean and deviation 0.5).
_SCALED = (np.arange(256) * FIXED["rescale_factor"]).astype(np.float32)
_VALUES: Array = (_SCALED - np.float32(0.5)) / np.float32(0.5)
