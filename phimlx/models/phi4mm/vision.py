"""Phi-4-multimodal's image encoder: the SigLIP tower over crops, and their assembly into features.

Where images lie in their crops is worked out in numpy, by `image_layouts`; what is computed of
pixels waits for no value, and so can be differentiated and compiled.
Source: the checkpoint's own `vision_siglip_navit.py` and `modeling_phi4mm.py`; transformers
`models/phi4_multimodal/modeling_phi4_multimodal.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from phimlx.errors import MediaError
from phimlx.machine.device import crops_at_once
from phimlx.machine.order import after
from phimlx.models.phi4mm.config import VisionConfig as VisionConfig
from phimlx.models.siglip import Encoder, gelu


class PatchConv(nn.Module):
    """A convolution whose stride is its size, so one matrix product; torch's weight layout."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.size = config.patch_size
        self.weight = mx.zeros((config.hidden_size, 3, self.size, self.size))
        self.bias = mx.zeros((config.hidden_size,))

    def __call__(self, pixels: mx.array) -> mx.array:
        """`[crops, 3, height, width]` to `[crops, patches, hidden]`, row by row."""
        crops, channels, height, width = pixels.shape
        size = self.size
        patches = (
            pixels.reshape(crops, channels, height // size, size, width // size, size)
            .transpose(0, 2, 4, 1, 3, 5)
            .reshape(crops, -1, channels * size * size)
            .astype(self.weight.dtype)
        )
        return mx.addmm(self.bias, patches, self.weight.reshape(len(self.weight), -1).T)


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.side = config.side
        self.patch_embedding = PatchConv(config)
        self.position_embedding = nn.Embedding(config.side**2, config.hidden_size)

    def __call__(self, pixels: mx.array, rows: int, columns: int) -> mx.array:
        """`[crops, 3, height, width]` to `[crops, patches, hidden]`, of which the first `rows` ×
        `columns` show the image."""
        size = self.patch_embedding.size
        height, width = pixels.shape[2] // size, pixels.shape[3] // size
        ids = np.zeros((height, width), dtype=np.int32)
        ids[:rows, :columns] = buckets(rows, self.side)[:, None] * self.side + buckets(
            columns, self.side
        )
        return self.patch_embedding(pixels) + self.position_embedding(mx.array(ids.reshape(-1)))


@lru_cache(maxsize=256)
def buckets(count: int, side: int) -> NDArray[np.intp]:
    """Position embedding, of `side` ones, of each of `count` patches spread over a crop's side.

    NaViT's fractional coordinates. Every step is rounded to float32 as the reference rounds it: at
    a bucket's edge one unit in the last place chooses another position.
    """
    step = np.float32(1) / np.float32(count)
    places = np.minimum(np.arange(count, dtype=np.float32) * step, np.float32(1 - 1e-6))
    edges = (np.arange(1, side) / side).astype(np.float32)
    return np.searchsorted(edges, places, side="right")


class Tower(nn.Module):
    """SigLIP up to the hidden layer before its last, pooled two by two."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def __call__(self, pixels: mx.array, rows: int, columns: int) -> mx.array:
        """Encode crops of whose patches the first `rows` × `columns` show the image.

        Padding patches are neither attended to nor used afterwards, so they are cut off; where an
        odd row or column is pooled with a padding one, that one is computed, and masked as a key.

        Args:
            pixels: `[crops, 3, size, size]`.

        Returns:
            `[crops, ⌈rows / 2⌉, ⌈columns / 2⌉, hidden]`.
        """
        size = self.embeddings.patch_embedding.size
        height, width = rows + rows % 2, columns + columns % 2
        x = self.embeddings(pixels[:, :, : height * size, : width * size], rows, columns)
        mask = None
        if (height, width) != (rows, columns):
            inside = (mx.arange(height) < rows)[:, None] & (mx.arange(width) < columns)
            mask = inside.reshape(1, 1, 1, -1)
        for layer in self.encoder.layers:
            x = layer(x, mask)
        return x.reshape(len(x), height // 2, 2, width // 2, 2, -1).mean(axis=(2, 4))


@dataclass(frozen=True)
class ImageLayout:
    """Find where an image lies in its crops.

    Attributes:
        rows, columns: of the grid of crops.
        height, width: patches of the grid that show the image, from its upper left corner.
    """

    rows: int
    columns: int
    height: int
    width: int


def image_layouts(
    image_attention_mask: NDArray[Any], image_sizes: NDArray[np.integer], config: VisionConfig
) -> list[ImageLayout]:
    """Find out where each image lies in its crops.

    Args:
        image_attention_mask: `[images, crops, 32, 32]`, 0 at patches of padding.
        image_sizes: `[images, 2]`, height and width of the grid in pixels.

    Raises:
        MediaError: for arrays that no image has.
    """
    return [
        _layout(mask != 0, size, config, index)
        for index, (mask, size) in enumerate(zip(image_attention_mask, image_sizes, strict=True))
    ]


class ImageEmbedding(nn.Module):
    """Images to features of the language model."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.img_processor = Tower(config)
        self.glb_GN = mx.zeros((1, 1, config.hidden_size))
        self.sub_GN = mx.zeros((1, 1, 1, config.hidden_size))
        self.img_projection = [
            nn.Linear(config.hidden_size, hidden_size),
            nn.Identity(),  # the activation's place
            nn.Linear(hidden_size, hidden_size),
        ]

    def __call__(
        self, input_image_embeds: mx.array, layouts: Sequence[ImageLayout]
    ) -> list[mx.array]:
        """Features of each image `[tokens, hidden]`; arguments as for `encode`."""
        return [self.project(rows) for rows in self.encode(input_image_embeds, layouts)]

    def encode(
        self, input_image_embeds: mx.array, layouts: Sequence[ImageLayout]
    ) -> list[mx.array]:
        """Features of each image before the projection, in the order of its placeholders.

        Args:
            input_image_embeds: `[images, crops, 3, 448, 448]`: the global view, then the grid's
                crops row by row, then padding up to the batch's largest.
            layouts: from `image_layouts`.

        Returns:
            For each image `[tokens, tower's hidden]`: the grid's rows, each ended by `sub_GN`;
            `glb_GN`; the global view's rows, each ended by `sub_GN`. A crop's 32 × 32 patches
            become 16 × 16 features, of which only those that show the image are kept.
        """
        features: dict[tuple[int, int], mx.array] = {}  # by (image, crop)
        pooled: list[mx.array] = []
        for shown, crops in self._batches(layouts):
            pixels = mx.stack([input_image_embeds[crop] for crop in crops])
            pooled = [self.img_processor(after(pixels, *pooled), *shown)]
            features.update(zip(crops, pooled[0], strict=True))
        return [self._assemble(i, layout, features) for i, layout in enumerate(layouts)]

    def _batches(
        self, layouts: Sequence[ImageLayout]
    ) -> Iterator[tuple[tuple[int, int], list[tuple[int, int]]]]:
        """Batches of crops that show equally much and so need no padding among each other.

        Yields:
            Rows and columns of patches that each of them shows, and (image, crop) of each.
        """
        side = self.config.side
        alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i, layout in enumerate(layouts):
            alike.setdefault((side, side), []).append((i, 0))
            for k in range(layout.rows * layout.columns):
                row, column = divmod(k, layout.columns)
                shown = (
                    min(layout.height - row * side, side),
                    min(layout.width - column * side, side),
                )
                if min(shown) > 0:
                    alike.setdefault(shown, []).append((i, 1 + k))
        size = crops_at_once()
        for shown, crops in alike.items():
            for start in range(0, len(crops), size):
                yield shown, crops[start : start + size]

    def _assemble(
        self, index: int, layout: ImageLayout, features: Mapping[tuple[int, int], mx.array]
    ) -> mx.array:
        """Features of one image before the projection, of its crops' by (image, crop)."""

        def grid_row(row: int) -> mx.array:
            crops = [1 + row * layout.columns + column for column in range(layout.columns)]
            shown = [features[index, crop] for crop in crops if (index, crop) in features]
            return mx.concatenate(shown, axis=1)

        used = math.ceil(layout.height / self.config.side)
        grid = mx.concatenate([grid_row(row) for row in range(used)], axis=0)
        return mx.concatenate(
            [self._end_rows(grid), self.glb_GN[0], self._end_rows(features[index, 0])]
        )

    def project(self, rows: mx.array) -> mx.array:
        """Project `[tokens, tower's hidden]` to `[tokens, hidden]`."""
        up, _, down = self.img_projection
        return down(gelu(up(rows)))

    def _end_rows(self, grid: mx.array) -> mx.array:
        """`[rows, columns, hidden]`, each row ended by `sub_GN`, as `[tokens, hidden]`."""
        ends = mx.broadcast_to(self.sub_GN[0], (len(grid), 1, grid.shape[-1]))
        return mx.concatenate([grid, ends], axis=1).reshape(-1, grid.shape[-1])


def _layout(
    mask: NDArray[np.bool_], size: NDArray[np.integer], config: VisionConfig, index: int
) -> ImageLayout:
    """The layout of one image, from its crops' masks `[crops, side, side]` and grid's pixels."""
    side = config.side
    rows, columns = (int(pixels) // config.image_size for pixels in size)
    if rows < 1 or columns < 1 or rows * columns >= len(mask):
        raise MediaError(
            f"Picture {index + 1} is {size[0]} × {size[1]} pixels by image_sizes, which does not "
            f"fit its {len(mask)} crops.",
            hint="The arrays must come from one call of the processor.",
        )
    crops = mask[1 : 1 + rows * columns].reshape(rows, columns, side, side)
    grid = crops.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    height, width = int(grid[:, 0].sum()), int(grid[0].sum())
    if (
        not mask[0].all()
        or not height
        or not grid[:height, :width].all()
        or (int(grid.sum()) != height * width)
    ):
        raise MediaError(
            f"The attention mask of picture {index + 1} is not a whole global view and a picture "
            "with padding to its right and below.",
            hint="The arrays must come from one call of the processor.",
        )
    return ImageLayout(rows, columns, height, width)
