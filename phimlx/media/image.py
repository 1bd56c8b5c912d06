"""Images as the vision tower was trained on them: crops of 448 × 448 and one view of the whole."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from phimlx.errors import ConfigError, MediaError, shortened
from phimlx.media.image_file import ImageSource, load_image
from phimlx.media.limits import Limits
from phimlx.models.phi4mm.config import DYNAMIC_HD as DYNAMIC_HD

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CropLayout", "ImageSource", "Images", "load_image", "prepare_images"]

Array = np.ndarray[Any, Any]

CROP = 448  # pixels, the tower's input
PATCH = 14  # pixels of one patch
PATCHES_PER_SIDE = CROP // PATCH  # patches along a crop, 32
POOL = 2  # patches along a token
MAX_CROPS = 100  # that a config may ask for
MIN_SIDE = 10  # pixels left of the shorter side


@dataclass(frozen=True)
class Images:
    """Image inputs of the model, padded to the image with most crops.

    Attributes:
        input_image_embeds: float32 [images, 1 + crops, 3, 448, 448], −1 to 1; the whole first,
            then the crops by rows; 0 where a picture has fewer crops than another.
        image_sizes: int64 [images, 2], height and width that the crops cover, in pixels.
        image_attention_mask: float32 [images, 1 + crops, 32, 32], 1 where a patch holds some of the
            picture or belongs to a crop that is not there.
        tokens: slots that each picture fills in the prompt.
        digests: SHA-256 of each picture's size and RGB pixels.
    """

    input_image_embeds: Array
    image_sizes: Array
    image_attention_mask: Array
    tokens: list[int]
    digests: list[bytes]

    def arrays(self) -> dict[str, Array]:
        """Return the model's inputs, under its own names."""
        return {
            "input_image_embeds": self.input_image_embeds,
            "image_sizes": self.image_sizes,
            "image_attention_mask": self.image_attention_mask,
        }


def image_processor(settings: Mapping[str, Any]) -> Callable[..., Images]:
    """Make what prepares images for a checkpoint; see `Architecture.prepare_images`."""
    crops = settings.get("dynamic_hd")
    crops = DYNAMIC_HD if crops is None else crops
    if type(crops) is not int or not 1 <= crops <= MAX_CROPS:
        raise ConfigError(
            f"preprocessor_config.json: dynamic_hd is {shortened(crops)}; it must be from 1 to "
            f"{MAX_CROPS}."
        )
    return partial(prepare_images, dynamic_hd=crops)


def prepare_images(
    sources: Sequence[ImageSource], limits: Limits | None = None, dynamic_hd: int = DYNAMIC_HD
) -> Images:
    """Read images and cut them into crops as the model was trained on them.

    The arrays are those of processing_phi4mm.py in microsoft/Phi-4-multimodal-instruct: resized by
    Pillow's bilinear filter, white beside and below, the whole by a bicubic filter without
    antialiasing.

    Args:
        dynamic_hd: most crops of one picture, from the checkpoint's preprocessor_config.json.

    Raises:
        MediaError: there is no picture, or one cannot be read (see `load_image`), or is so long
            that its shorter side vanishes.
    """
    if not sources:
        raise MediaError("There is no picture to prepare.")
    layouts, canvases, digests = [], [], []
    for source in sources:
        image = load_image(source, limits)
        layout = CropLayout.of(*image.size, dynamic_hd)
        layouts.append(layout)
        canvases.append(_padded(image, layout))
        digests.append(image_digest(image))
    crops = 1 + max(layout.crops for layout in layouts)
    embeds = np.zeros((len(layouts), crops, 3, CROP, CROP), np.float32)
    masks = np.ones((len(layouts), crops, PATCHES_PER_SIDE, PATCHES_PER_SIDE), np.float32)
    for embed, mask, canvas, layout in zip(embeds, masks, canvases, layouts, strict=True):
        _fill(embed[: 1 + layout.crops], canvas, layout)
        mask[1 : 1 + layout.crops] = layout.mask()
    return Images(
        input_image_embeds=embeds,
        image_sizes=np.array([canvas.shape[:2] for canvas in canvases], np.int64),
        image_attention_mask=masks,
        tokens=[layout.tokens for layout in layouts],
        digests=digests,
    )


@dataclass(frozen=True)
class CropLayout:
    """Place of an image on its grid of crops: top left, white beside or below.

    Attributes:
        columns, rows: crops.
        width, height: pixels of the resized picture.
    """

    columns: int
    rows: int
    width: int
    height: int

    @staticmethod
    def of(width: int, height: int, dynamic_hd: int = DYNAMIC_HD) -> CropLayout:
        """Choose the grid for an image of so many pixels.

        Raises:
            MediaError: the shorter side would have fewer than 10 pixels.
        """
        columns, rows = math.ceil(width / CROP), math.ceil(height / CROP)
        if columns * rows > dynamic_hd:
            columns, rows = _closest_grid(width, height, dynamic_hd)
        across, down = columns * CROP / width, rows * CROP / height
        if across < down:
            layout = CropLayout(columns, rows, columns * CROP, int(height * across))
        else:
            layout = CropLayout(columns, rows, int(width * down), rows * CROP)
        if min(layout.width, layout.height) < MIN_SIDE:
            raise MediaError(
                f"A picture of {width:,} × {height:,} pixels is too long: the model would see "
                f"fewer than {MIN_SIDE} pixels of its shorter side.",
                hint="Enlarge it or cut it into pieces.",
            )
        return layout

    @property
    def crops(self) -> int:
        return self.columns * self.rows

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches that are not wholly white."""
        below = (self.rows * CROP - self.height) // PATCH
        beside = (self.columns * CROP - self.width) // PATCH
        return self.rows * PATCHES_PER_SIDE - below, self.columns * PATCHES_PER_SIDE - beside

    @property
    def tokens(self) -> int:
        """Tokens in the prompt: the crops' rows, a separator, the whole's rows; each row ends."""
        rows, columns = (math.ceil(patches / POOL) for patches in self.patches)
        whole = PATCHES_PER_SIDE // POOL
        return rows * (columns + 1) + 1 + whole * (whole + 1)

    def mask(self) -> Array:
        """Float32 [crops, 32, 32], 1 where a patch is not wholly white."""
        rows, columns = self.patches
        mask = np.zeros((self.rows * PATCHES_PER_SIDE, self.columns * PATCHES_PER_SIDE), np.float32)
        mask[:rows, :columns] = 1
        return _tiles(mask[..., None], PATCHES_PER_SIDE).reshape(
            -1, PATCHES_PER_SIDE, PATCHES_PER_SIDE
        )


@cache
def _crop_grids(most: int) -> list[tuple[int, int]]:
    """Columns and rows of every grid, smallest first.

    The original sorts a set by area alone, so grids of one area keep the set's order, which decides
    between ratios that are equally near: the set is built here as it is built there.
    """
    grids = {
        (i, j)
        for side in range(1, most + 1)
        for i in range(1, side + 1)
        for j in range(1, side + 1)
        if i * j <= most
    }
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def _closest_grid(width: int, height: int, most: int) -> tuple[int, int]:
    """The grid nearest in aspect ratio; of equal ones a later one that is not twice too large."""
    best, nearest = (1, 1), math.inf
    for columns, rows in _crop_grids(most):
        distance = abs(width / height - columns / rows)
        roomy = width * height > 0.5 * CROP * CROP * columns * rows
        if distance < nearest or (distance == nearest and roomy):
            best, nearest = (columns, rows), distance
    return best


def image_digest(image: Image) -> bytes:
    """SHA-256 of an image's size and RGB pixels."""
    digest = hashlib.sha256(b"%d %d " % image.size)
    digest.update(np.asarray(image).data)
    return digest.digest()


def _padded(image: Image, layout: CropLayout) -> Array:
    """The resized picture on white: uint8 [448 × rows, 448 × columns, 3]."""
    from PIL.Image import Resampling

    size = (layout.width, layout.height)
    if image.size != size:
        image = image.resize(size, Resampling.BILINEAR)
    if size == (layout.columns * CROP, layout.rows * CROP):
        return np.asarray(image)
    canvas = np.full((layout.rows * CROP, layout.columns * CROP, 3), 255, np.uint8)
    canvas[: layout.height, : layout.width] = np.asarray(image)
    return canvas


def _fill(embed: Array, canvas: Array, layout: CropLayout) -> None:
    """Write the whole and the crops of a canvas into [1 + crops, 3, 448, 448]."""
    _normalise(_global_view(canvas), embed[0])
    tiles = embed[1:].reshape(layout.rows, layout.columns, 3, CROP, CROP)
    _normalise(_tiles(canvas, CROP), tiles)


def _tiles(canvas: Array, side: int) -> Array:
    """[rows × side, columns × side, channels] → [rows, columns, channels, side, side]."""
    height, width, channels = canvas.shape
    grid = canvas.reshape(height // side, side, width // side, side, channels)
    return grid.transpose(0, 2, 4, 1, 3)


def _normalise(pixels: Array, out: Array) -> None:
    """0 to 255 → −1 to 1, by the reference's own three steps (mean and deviation 0.5)."""
    np.divide(pixels, np.float32(255), out=out)
    out -= np.float32(0.5)
    out *= np.float32(2)


def _global_view(canvas: Array) -> Array:
    """The canvas shrunk to float32 [3, 448, 448], 0 to 255 and, as cubics overshoot, beyond.

    The model was trained on torch's bicubic without antialiasing: Keys' kernel with a = −0.75,
    pixel centres, edges repeated. Sides are whole multiples of 448, so every output lies alike
    between its taps: on a pixel for an odd multiple, halfway for an even one, where the taps weigh
    −3, 19, 19 and −3 in 32. Whole numbers stay exact: at most 2 × 19 × 255 after one axis.
    Source: R. Keys, Cubic convolution interpolation for digital image processing, 1981.
    """
    rows, down = _shrink(canvas, np.int16)  # [448, width, 3]
    columns, across = _shrink(rows.transpose(1, 2, 0), np.float32)  # [448, 3, 448]
    return columns.transpose(1, 2, 0) / np.float32(down * across)


def _shrink(pixels: Array, dtype: type[np.generic]) -> tuple[Array, int]:
    """The first axis shrunk to 448, times the number returned."""
    length = len(pixels)
    factor = length // CROP
    first = np.arange(CROP) * factor + (factor - 1) // 2
    if factor % 2:
        return pixels[first], 1
    before, left, right, after = (
        pixels[(first + tap).clip(0, length - 1)] for tap in (-1, 0, 1, 2)
    )
    inner = np.add(left, right, dtype=dtype)
    outer = np.add(before, after, dtype=dtype)
    inner *= 19
    outer *= 3
    inner -= outer
    return inner, 32
