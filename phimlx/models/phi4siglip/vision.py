"""Phi-4-reasoning-vision's image encoder: the SigLIP 2 tower over patches of a picture's own grid.

Source: the checkpoint's own `modeling_phi4_visionr.py`; transformers
`models/siglip2/modeling_siglip2.py` ("NaFlex", arXiv 2502.14786, section 2.4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from phimlx.errors import MediaError
from phimlx.machine.order import after
from phimlx.models.phi4siglip.config import VisionConfig
from phimlx.models.siglip import Encoder, gelu

Grid = tuple[int, int]
"""Rows and columns of a picture's patches."""


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.side = config.side
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def __call__(self, patches: mx.array, grid: Grid) -> mx.array:
        """`[1, patches, 768]` to `[1, patches, hidden]`, row by row of the grid."""
        dtype = self.position_embedding.weight.dtype
        x = self.patch_embedding(patches.astype(dtype))
        return x + self.positions(grid).astype(dtype)

    def positions(self, grid: Grid) -> mx.array:
        """Stretch the square grid of positions over a picture's, float32 `[patches, hidden]`."""
        square = self.position_embedding.weight.astype(mx.float32)
        square = square.reshape(self.side, self.side, -1)
        down, across = (mx.array(interpolation(self.side, length)) for length in grid)
        rows = mx.tensordot(down, square, axes=1)  # [rows, side, hidden]
        cells = mx.tensordot(rows, across, axes=[[1], [1]])  # [rows, hidden, columns]
        return cells.transpose(0, 2, 1).reshape(grid[0] * grid[1], -1)


@lru_cache(maxsize=256)
def interpolation(source: int, length: int) -> NDArray[np.float32]:
    """Weights `[length, source]` of a linear interpolation with half-pixel centres.

    Where it shrinks, the triangle widens, so that every source counts (antialiasing), as in
    torch's `interpolate(mode="bilinear", antialias=True, align_corners=False)`.
    """
    scale = source / length
    support = max(scale, 1.0)
    centres = scale * (np.arange(length) + 0.5)[:, None]
    distance = np.abs(np.arange(source) + 0.5 - centres) / support
    weights = np.maximum(0.0, 1.0 - distance)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


class VisionModel(nn.Module):
    """SigLIP 2 up to the hidden states before its last layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def __call__(self, patches: mx.array, grid: Grid) -> mx.array:
        """`[1, patches, 768]` to `[1, patches, hidden]`."""
        x = self.embeddings(patches, grid)
        for layer in self.encoder.layers:
            x = layer(x, None)
        return x


class VisionTower(nn.Module):
    """The tower under the names of the checkpoint, which wraps it twice."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision_tower = {"vision_model": VisionModel(config)}

    def __call__(self, pixel_values: mx.array, grids: Sequence[Grid]) -> list[mx.array]:
        """Encode pictures one after the other, so that none attends to padding.

        Args:
            pixel_values: `[pictures, longest, 768]`.
            grids: of each picture.

        Returns:
            `[patches, hidden]` of each.
        """
        model = self.vision_tower["vision_model"]
        made: list[mx.array] = []
        for patches, grid in zip(pixel_values, grids, strict=True):
            own = patches[None, : grid[0] * grid[1]]
            made.append(model(after(own, *made[-1:]), grid)[0])
        return made


def projector(width: int, hidden_size: int) -> list[nn.Module]:
    """Layers from the tower's width to the language model's."""
    return [
        nn.Linear(width, hidden_size),
        nn.Identity(),  # the activation's place
        nn.Linear(hidden_size, hidden_size),
    ]


def project(layers: Sequence[nn.Module], x: mx.array) -> mx.array:
    """Apply a projector to `[..., width]`."""
    up, _, down = layers
    return down(gelu(up(x)))


def image_grids(
    shape: Sequence[int],
    spatial_shapes: NDArray[np.integer],
    pixel_attention_mask: NDArray[Any] | None,
    config: VisionConfig,
) -> list[Grid]:
    """Find the grid of each picture's patches.

    Args:
        shape: of the patches, `[pictures, longest, numbers]`.
        spatial_shapes: `[pictures, 2]`, rows and columns.
        pixel_attention_mask: `[pictures, longest]`, 0 at padding; None where it is not given.

    Raises:
        MediaError: for arrays that no picture has.
    """
    pictures, longest, numbers = shape
    expected = 3 * config.patch_size**2
    if numbers != expected:
        raise MediaError(f"A patch has {numbers} numbers, but the model takes {expected}.")
    if spatial_shapes.shape != (pictures, 2):
        raise MediaError(
            f"spatial_shapes has the shape {list(spatial_shapes.shape)}, not [{pictures}, 2]."
        )
    grids: list[Grid] = [(int(rows), int(columns)) for rows, columns in spatial_shapes]
    for index, (rows, columns) in enumerate(grids):
        patches = rows * columns
        mask = None if pixel_attention_mask is None else pixel_attention_mask[index] != 0
        fits = mask is None or (mask[:patches].all() and not mask[patches:].any())
        if rows < 1 or columns < 1 or patches > longest or not fits:
            raise MediaError(
                f"Picture {index + 1} has {rows} × {columns} patches by spatial_shapes, which does "
                "not fit its patches and their mask.",
                hint="The arrays must come from one call of the processor.",
            )
    return grids
