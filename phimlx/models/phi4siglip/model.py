"""Phi-4-reasoning-vision: phi-4 with a SigLIP 2 tower.

Fields carry the published checkpoint's names. Source: the checkpoint's own
`modeling_phi4_visionr.py` (microsoft/Phi-4-reasoning-vision-15B).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from phimlx.errors import PromptError
from phimlx.models.cache.kv import Cache
from phimlx.models.features import Features, Placeholders
from phimlx.models.multimodal import MultimodalLM, given, needed
from phimlx.models.phi3 import Phi3Model
from phimlx.models.phi4siglip.config import IMAGE, Phi4SiglipConfig
from phimlx.models.phi4siglip.vision import (
    Grid,
    VisionTower,
    image_grids,
    project,
    projector,
)
from phimlx.sizes import counted


class Phi4SiglipModel(Phi3Model):
    """Embeddings and decoder layers, and what pictures go through before them."""

    def __init__(self, config: Phi4SiglipConfig) -> None:
        super().__init__(config)
        self.vision_tower = VisionTower(config.vision)
        self.mm_projector = projector(config.vision.hidden_size, config.hidden_size)


class Phi4SiglipForCausalLM(MultimodalLM):
    """A language model that sees. A picture is as many tokens as it has patches."""

    model_type = "phi4-siglip"
    config: Phi4SiglipConfig

    def __init__(self, config: Phi4SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.placeholders = Placeholders(IMAGE)
        self.longest_with_media = config.longest_with_media
        self.model = Phi4SiglipModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def feature_widths(self) -> tuple[int, int]:
        return self.config.hidden_size, 0

    @property
    def unused(self) -> tuple[str, ...]:
        tower = "model.vision_tower.vision_tower.vision_model."
        last = f"encoder.layers.{self.config.vision.num_hidden_layers - 1}."
        return (
            *super().unused,
            *(f"{tower}{part}*" for part in (last, "post_layernorm.", "head.")),
        )

    def embed(self, input_ids: mx.array) -> mx.array:
        # A picture's place is no row of the embedding; whatever is read there is replaced.
        return super().embed(mx.maximum(input_ids, 0))

    def encode_media(  # type: ignore[override]  # the processor's own names
        self,
        *,
        pixel_values: mx.array | None = None,
        pixel_attention_mask: mx.array | None = None,
        spatial_shapes: mx.array | None = None,
    ) -> Features:
        """Run the tower, once, over what the checkpoint's processor makes of pictures.

        Args:
            pixel_values: `[pictures, longest, 768]`, patches row by row, then padding; None or
                empty where there are no pictures.
            pixel_attention_mask: `[pictures, longest]`, 0 at padding.
            spatial_shapes: `[pictures, 2]`, rows and columns of patches.
        """
        pixels = given(pixel_values)
        if pixels is None:
            return Features()
        grids = self._grids(pixels, pixel_attention_mask, spatial_shapes)
        patches = mx.concatenate(self.model.vision_tower(pixels, grids))
        return Features(project(self.model.mm_projector, patches))  # [tokens, hidden]

    def _grids(self, pixels: mx.array, mask: Any, spatial_shapes: Any) -> list[Grid]:
        sizes = np.array(needed(spatial_shapes, "spatial_shapes", "pixel_values"))
        mask = given(mask)
        known = None if mask is None else np.array(mask)
        return image_grids(pixels.shape, sizes, known, self.config.vision)

    def __call__(
        self,
        input_ids: mx.array,
        cache: Cache | None = None,
        attention_mask: mx.array | None = None,
        **inputs: mx.array | None,
    ) -> mx.array:
        """Compute the logits of every token, pictures spliced in.

        As in the original, rows with pictures lose what stands behind `longest_with_media`, and
        rows are padded on the right to the longest.

        Args:
            input_ids: `[batch, length]`; -200 stands for a picture, in the order of the pictures,
                row after row.
            cache, attention_mask: as for every model.
            inputs: pictures, as `encode_media` takes them.

        Returns:
            `[batch, longest, vocab]`, where a picture counts as its patches.

        Raises:
            PromptError: where there are more or fewer places than pictures.
        """
        pixels = given(inputs.get("pixel_values"))
        if pixels is None:
            return super().__call__(input_ids, cache, attention_mask, **inputs)
        grids = self._grids(
            pixels, inputs.get("pixel_attention_mask"), inputs.get("spatial_shapes")
        )
        features = self.encode_media(**inputs)
        counts = [rows * columns for rows, columns in grids]
        mask = None if attention_mask is None else np.array(attention_mask) != 0
        rows, kept = spliced(np.array(input_ids), mask, counts, self.longest_with_media)
        assert features.images is not None
        length = max(map(len, rows))
        ids, real = (np.zeros((len(rows), length), np.int32) for _ in range(2))
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)], real[row, : len(tokens)] = tokens, 1
        padded = None if real.all() else mx.array(real)
        shown = Features(features.images[mx.array(kept)])
        return self.head(self.hidden_states(mx.array(ids), cache, padded, shown))


def spliced(
    input_ids: np.ndarray, mask: np.ndarray | None, counts: Sequence[int], longest: int | None
) -> tuple[list[list[int]], list[int]]:
    """Repeat each picture's placeholder as often as it has features.

    Args:
        input_ids: `[batch, length]`.
        mask: `[batch, length]`, false at padding, which is left out; None where there is none.
        counts: features of each picture.
        longest: tokens that are kept of a row; all of them where None.

    Returns:
        The tokens of each row, and the numbers of the features that have a place among them.

    Raises:
        PromptError: where there are more or fewer places than pictures.
    """
    shown = input_ids == IMAGE if mask is None else (input_ids == IMAGE) & mask
    places = int(shown.sum())
    if places != len(counts):
        raise PromptError(
            f"The input has {counted(places, 'place')} for pictures, but "
            f"{counted(len(counts), 'picture is', 'pictures are')} given."
        )
    starts = np.cumsum([0, *counts])
    picture, rows, kept = 0, [], []
    for number, row in enumerate(input_ids):
        tokens: list[int] = []
        own: list[int] = []
        for token in (row if mask is None else row[mask[number]]).tolist():
            if token == IMAGE:
                tokens += [IMAGE] * counts[picture]
                own += range(starts[picture], starts[picture + 1])
                picture += 1
            else:
                tokens.append(token)
        rows.append(tokens[:longest])
        kept += own[: rows[-1].count(IMAGE)]
    return rows, kept
