"""The reference's encoders, called piecewise for training, and what makes their inputs.

Whatever is computed here equals the reference's own forward pass; it knows no data and no loss.
"""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers.masking_utils import create_bidirectional_mask

CROP, PATCH = 448, 14
Prepared = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def prepare(images: list[Image.Image]) -> Prepared:
    """Pixels [n, crops, 3, 448, 448], patch masks [n, crops, 32, 32] and sizes [n, 2] of pictures.

    All are of one size, each side a multiple of 448 or one side short of 448: then the published
    processor does not resize, and this equals it. The global view comes first.
    """
    width, height = images[0].size
    across, down = math.ceil(width / CROP), math.ceil(height / CROP)
    if any(image.size != (width, height) for image in images):
        raise ValueError("Pictures of one size are needed")
    if (width % CROP and (width > CROP or height != CROP)) or (
        height % CROP and (height > CROP or width != CROP)
    ):
        raise ValueError(f"{width} x {height} would have to be resized")
    pixels = np.full((len(images), down * CROP, across * CROP, 3), 255, np.uint8)
    pixels[:, :height, :width] = np.stack([np.asarray(image) for image in images])
    full = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    mask = torch.ones(len(images), down * 32, across * 32)
    if spare := (across * CROP - width) // PATCH:
        mask[:, :, -spare:] = 0
    if spare := (down * CROP - height) // PATCH:
        mask[:, -spare:] = 0
    view = functional.interpolate(full, (CROP, CROP), mode="bicubic", align_corners=False)
    crops = full.unflatten(2, (down, CROP)).unflatten(4, (across, CROP))
    crops = crops.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [n, down * across, 3, 448, 448]
    masks = mask.unflatten(1, (down, 32)).unflatten(3, (across, 32))
    masks = masks.permute(0, 1, 3, 2, 4).flatten(1, 2)
    pixels_all = torch.cat([view[:, None], crops], 1)
    masks_all = torch.cat([torch.ones_like(masks[:, :1]), masks], 1)
    sizes = torch.tensor([[down * CROP, across * CROP]] * len(images))
    return pixels_all, masks_all, sizes


def image_tokens(width: int, height: int) -> int:
    """Tokens of a picture that `prepare` takes."""
    down, across = math.ceil(height / CROP) * 16, math.ceil(width / CROP) * 16
    rows = down - (down * 28 - height) // 28
    columns = across - (across * 28 - width) // 28
    return 256 + 16 + 1 + rows * (columns + 1)


def crop_features(image_embed: Any, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Encoder features of single crops after pooling. [n, 3, 448, 448], [n, 32, 32] -> [n, 256, d]

    Layers that the features do not depend on are not computed.
    """
    tower = image_embed.img_processor
    hidden = tower.embeddings(pixel_values=pixels, patch_attention_mask=mask.bool())
    bias = create_bidirectional_mask(
        config=tower.config, inputs_embeds=hidden, attention_mask=mask.bool().flatten(1)
    )
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, bias)
    grid = hidden.transpose(1, 2).unflatten(2, (32, 32))
    return image_embed.image_token_compression(grid).flatten(2).transpose(1, 2)


def window_features(
    image_embed: Any, pixels: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Encoder features of windows cut out of crops, cheaper to train on than whole crops.

    `pixels` [n, 3, height, width], position buckets `rows` [n, height / 14] and `columns`
    [n, width / 14] -> [n, cells, d]
    """
    tower = image_embed.img_processor
    hidden = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    places = (rows[:, :, None] * 32 + columns[:, None, :]).flatten(1)
    hidden = hidden + tower.embeddings.position_embedding(places)
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    grid = hidden.transpose(1, 2).unflatten(2, (rows.shape[1], columns.shape[1]))
    return image_embed.image_token_compression(grid).flatten(2).transpose(1, 2)


def arrange(image_embed: Any, crops: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """Projected rows of the joined crops [n, rows, columns, d] and of the global view."""

    def lines(grid: torch.Tensor) -> torch.Tensor:
        separator = image_embed.sub_img_feature_extensor.expand(*grid.shape[:2], 1, -1)
        return torch.cat([grid, separator], 2).flatten(1, 2)

    middle = image_embed.global_img_feature_extensor.expand(len(crops), 1, -1)
    joined = torch.cat([lines(crops), middle, lines(view)], 1)
    up, down = image_embed.img_projection_up, image_embed.img_projection_down
    return down(functional.gelu(up(joined)))


def image_rows(image_embed: Any, prepared: Prepared) -> torch.Tensor:
    """Projected rows of pictures of one size, in prompt order. -> [n, tokens, hidden]"""
    pixels, masks, sizes = prepared
    down, across = (sizes[0] // CROP).tolist()
    if pixels.shape[1] == 2 and masks.all():  # the only crop and the global view are the same
        features = crop_features(image_embed, pixels[:, 1], masks[:, 1])[:, None]
        features = features.expand(-1, 2, -1, -1)
    else:
        features = crop_features(image_embed, pixels.flatten(0, 1), masks.flatten(0, 1))
        features = features.unflatten(0, pixels.shape[:2])
    grids = features.unflatten(2, (16, 16))  # [n, 1 + crops, 16, 16, d]
    whole = grids[:, 1:].unflatten(1, (down, across)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    useful = masks[0, 1:, ::2, ::2].unflatten(0, (down, across)).transpose(1, 2)
    useful = useful.flatten(0, 1).flatten(1, 2)
    rows, columns = int(useful[:, 0].sum()), int(useful[0].sum())
    return arrange(image_embed, whole[:, :rows, :columns], grids[:, 0])


def small_rows(image_embed: Any, images: list[Image.Image]) -> torch.Tensor:
    """Rows laid out as `image_rows` does, of square pictures that are shown at their own size."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    pixels = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    side = pixels.shape[-1] // PATCH
    places = (torch.arange(side) * 32 // side).expand(len(images), -1)
    grid = window_features(image_embed, pixels, places, places)
    grid = grid.unflatten(1, (side // 2, side // 2))
    return arrange(image_embed, grid, grid)


def clip_features(encoder: Any, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Encoder features of padded clips, each as the clip alone gives it: at most 500 tokens.

    `frames` [n, frames, 80] and their counts [n] -> [n, ceil(frames / 8), d]. The native port adds
    its boolean mask to the scores and lets convolutions see the padding; here neither is seen, so
    that a batch trains what single clips will use.
    """
    hidden = encoder.encoder_embedding(frames)[:, None]  # [n, 1, frames, 80]
    for layer in encoder.embed.conv:
        if isinstance(layer, torch.nn.Conv2d) and layer.stride[0] == 2:
            inside = torch.arange(hidden.shape[2]) < lengths[:, None]
            hidden = hidden * inside[:, None, :, None]
            lengths = (lengths + 1) // 2
        hidden = layer(hidden)
    hidden = encoder.embed.out(hidden.transpose(1, 2).flatten(2))  # [n, tokens, d]
    bias = encoder.relative_attention_bias_layer(hidden)
    inside = torch.arange(hidden.shape[1]) < lengths[:, None]
    bias = bias.masked_fill(~inside[:, None, None], torch.finfo(bias.dtype).min)
    for block in encoder.encoders:
        hidden = block(hidden, bias)
    return hidden


def clip_rows(audio_embed: Any, features: torch.Tensor, adapter: str) -> torch.Tensor:
    """Features as the language model takes them under `adapter`. [..., d] -> [..., hidden]"""
    suffix = "speech" if adapter == "speech" else "vision_speech"
    up = getattr(audio_embed, f"up_proj_for_{suffix}")
    down = getattr(audio_embed, f"down_proj_for_{suffix}")
    return down(functional.gelu(up(features)))
