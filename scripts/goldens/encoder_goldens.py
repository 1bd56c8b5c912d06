"""Reference features of Phi-4-multimodal's encoders, made by transformers in float32.

    python scripts/goldens/encoder_goldens.py tests/goldens/encoders

Writes `vision.safetensors` and `audio.safetensors`: tiny random weights under their published
names, inputs and outputs, and the config in the metadata. Needs torch and transformers, which
phimlx itself never does.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Phi4MultimodalConfig
from transformers.models.phi4_multimodal import modeling_phi4_multimodal
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import (
    Phi4MultimodalAudioEmbedding,
    Phi4MultimodalAudioModel,
    Phi4MultimodalImageEmbedding,
)

SEED = 20261
HIDDEN = 8
IMAGE_ID, AUDIO_ID = 6, 7

VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "patch_size": 2, "image_size": 64,
}  # fmt: skip
AUDIO = {
    "attention_dim": 24, "attention_heads": 2, "linear_units": 16, "num_blocks": 2,
    "input_size": 80, "kernel_size": 3, "ext_pw_out_channel": 24,
    "depthwise_seperable_out_channel": 24, "nemo_conv_settings": {"conv_channels": 12},
    "relative_attention_bias_args": {"type": "t5", "t5_bias_max_distance": 500},
    "time_reduction": 8,
}  # fmt: skip

# Grid in crops, and height and width in patches of the picture within it.
BATCHES = {
    "square": [(1, 1, 32, 32)],
    "mixed": [(1, 3, 23, 90), (2, 1, 51, 32), (1, 1, 32, 7)],
    "corner": [(2, 2, 41, 50)],
    "empty_crops": [(2, 2, 30, 20)],
}

# Frames of each clip; several are padded together.
CLIPS = {
    "one_frame": [1],
    "edge_8": [8],
    "edge_9": [9],
    "3_seconds": [301],
    "500_tokens": [4000],
    "501_tokens": [4001],
    "45_seconds": [4500],
    "two_padded": [301, 150],
    "long_and_short": [4301, 77],
}
MASKED_ALONE = [150]

PUBLISHED_NAMES = [
    (r"global_img_feature_extensor", "glb_GN"),
    (r"sub_img_feature_extensor", "sub_GN"),
    (r"img_projection_up", "img_projection.0"),
    (r"img_projection_down", "img_projection.2"),
    (r"up_proj_for_speech", "audio_projection.speech.0"),
    (r"down_proj_for_speech", "audio_projection.speech.2"),
    (r"up_proj_for_vision_speech", "audio_projection.vision.0"),
    (r"down_proj_for_vision_speech", "audio_projection.vision.2"),
    (r"gate_up_proj", "net.0.linear"),
    (r"(feed_forward_\w+)\.down_proj", r"\1.net.2"),
    (r"(encoders.*self_attn)\.([qkv])_proj", r"\1.linear_\2"),
    (r"(encoders.*self_attn)\.o_proj", r"\1.linear_out"),
]


def published(name: str) -> str:
    for pattern, replacement in PUBLISHED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def randomize(module: torch.nn.Module) -> None:
    """Weights large enough that every part is seen, and exact in bfloat16."""
    for name, tensor in module.state_dict().items():
        noise = torch.randn_like(tensor)
        if ("norm" in name and name.endswith("weight")) or name.endswith("invstd"):
            noise = 1 + 0.3 * noise
        elif tensor.ndim > 1 and not re.search(
            r"position_embedding|bias_values|\.b[12]$|sor$", name
        ):
            noise = 1.2 * noise / tensor[0].numel() ** 0.5
        tensor.copy_(noise.bfloat16().float())


def weights(module: torch.nn.Module, unused: str) -> dict[str, torch.Tensor]:
    return {
        f"weights.{published(name)}": tensor.bfloat16()
        for name, tensor in module.state_dict().items()
        if not re.search(unused, name)
    }


@torch.no_grad()
def vision(folder: Path) -> None:
    config = Phi4MultimodalConfig(
        hidden_size=HIDDEN,
        vision_config={**VISION, "crop_size": VISION["image_size"], "image_token_id": IMAGE_ID},
    )
    config.vision_config._attn_implementation = "eager"
    module = Phi4MultimodalImageEmbedding(config).eval()
    randomize(module)
    arrays = weights(module, r"\.head\.|post_layernorm|layers\.2\.")
    side, size = 32, VISION["image_size"]
    # The pictures of every batch are cut from the same few crops, which keeps the file small.
    crops = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    arrays["crops"] = crops
    for name, pictures in BATCHES.items():
        most = 1 + max(rows * columns for rows, columns, _, _ in pictures)
        chosen = torch.randint(0, len(crops), (len(pictures), most))
        masks = torch.zeros(len(pictures), most, side, side)
        counts = []
        for i, (rows, columns, height, width) in enumerate(pictures):
            grid = torch.zeros(rows * side, columns * side)
            grid[:height, :width] = 1
            masks[i, 0] = 1
            masks[i, 1 : 1 + rows * columns] = (
                grid.reshape(rows, side, columns, side).transpose(1, 2).reshape(-1, side, side)
            )
            high, wide = -(-height // 2), -(-width // 2)
            counts.append(high * (wide + 1) + 1 + 16 * 17)
        sizes = torch.tensor([[rows * size, columns * size] for rows, columns, _, _ in pictures])
        found = module(
            torch.full((1, sum(counts)), IMAGE_ID),
            torch.zeros(1, sum(counts), HIDDEN),
            image_pixel_values=crops[chosen] / 127.5 - 1,
            image_sizes=sizes,
            image_attention_mask=masks,
        )
        arrays[f"{name}.chosen"] = chosen.int()
        arrays[f"{name}.image_attention_mask"] = masks.to(torch.uint8)
        arrays[f"{name}.image_sizes"] = sizes.int()
        arrays[f"{name}.tokens"] = torch.tensor(counts, dtype=torch.int32)
        arrays[f"{name}.rows"] = found[0]
    save(folder / "vision.safetensors", arrays, {"vision_config": VISION}, list(BATCHES))


def fold(clips: torch.Tensor, length: int) -> torch.Tensor:
    """Whole chunks; transformers' own cannot fold more than one clip."""
    return clips.reshape(-1, length, clips.shape[-1])


def mask_as_the_original(encoder: Phi4MultimodalAudioModel) -> None:
    """Add -∞ at padding, where transformers adds 0 or 1."""

    def added(allowed: torch.Tensor) -> torch.Tensor:
        return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)

    embeddings, folded = encoder.forward_embeddings, encoder.calculate_hs_mask

    def forward_embeddings(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        hidden, allowed, padding = embeddings(*args)
        return hidden, added(allowed), padding

    encoder.forward_embeddings = forward_embeddings
    encoder.calculate_hs_mask = lambda *args: added(folded(*args))


@torch.no_grad()
def audio(folder: Path) -> None:
    config = Phi4MultimodalConfig(
        hidden_size=HIDDEN,
        audio_config={
            "hidden_size": AUDIO["attention_dim"], "intermediate_size": AUDIO["linear_units"],
            "num_blocks": AUDIO["num_blocks"], "num_attention_heads": AUDIO["attention_heads"],
            "ext_pw_out_channel": AUDIO["attention_dim"],
            "depthwise_separable_out_channel": AUDIO["attention_dim"],
            "nemo_conv_channels": AUDIO["nemo_conv_settings"]["conv_channels"],
            "bias_max_distance": 500, "audio_token_id": AUDIO_ID,
        },
    )  # fmt: skip
    config.audio_config._attn_implementation = "eager"
    module = Phi4MultimodalAudioEmbedding(config).eval()
    randomize(module)
    mask_as_the_original(module.encoder)
    modeling_phi4_multimodal.unfold_tensor = fold
    arrays = weights(module, r"^$")
    # Clips repeat a piece whose length shares no factor with a token's eight frames.
    piece = torch.randint(-128, 128, (157, AUDIO["input_size"]), dtype=torch.int8)
    arrays["piece"] = piece

    def run(name: str, frames: list[int], masked: bool) -> None:
        clips = torch.zeros(len(frames), max(frames), AUDIO["input_size"])
        mask = torch.zeros(clips.shape[:2], dtype=torch.bool)
        for i, count in enumerate(frames):
            clips[i, :count] = piece[torch.arange(count) % len(piece)] / 32
            mask[i, :count] = True
        features = module.encoder(clips, mask if masked else None)
        sizes = [-(-count // 8) for count in frames]
        arrays[f"{name}.frames"] = torch.tensor(frames, dtype=torch.int32)
        arrays[f"{name}.audio_embed_sizes"] = torch.tensor(sizes, dtype=torch.int32)
        rows = torch.cat([clip[:count] for clip, count in zip(features, sizes, strict=True)])
        arrays[f"{name}.features"] = rows[watched(len(rows))]

    for name, frames in CLIPS.items():
        run(name, frames, masked=len(frames) > 1)
    run("masked_alone", MASKED_ALONE, masked=True)
    features = torch.randn(5, AUDIO["attention_dim"])
    arrays["projected.features"] = features
    for mode in ("speech", "vision_speech"):
        up = getattr(module, f"up_proj_for_{mode}")
        down = getattr(module, f"down_proj_for_{mode}")
        rows = down(torch.nn.functional.gelu(up(features)))
        arrays[f"projected.{mode.split('_')[0]}"] = rows
    processor = {"audio_processor": {"name": "cascades", "config": AUDIO}}
    save(folder / "audio.safetensors", arrays, processor, [*CLIPS, "masked_alone"])


def watched(count: int) -> np.ndarray:
    """All rows of a short output; of a long one, those spread over it and around each fold."""
    if count <= 64:
        return np.arange(count)
    spread = np.linspace(0, count - 1, 40)
    return np.unique(np.concatenate([spread, np.arange(495, min(505, count))]).astype(int))


def save(path: Path, arrays: dict[str, torch.Tensor], config: Any, cases: list[str]) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in arrays.items()}
    full = {"hidden_size": HIDDEN, **config}
    save_file(contiguous, path, metadata={"config": json.dumps(full), "cases": json.dumps(cases)})
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    vision(Path(sys.argv[1]))
    audio(Path(sys.argv[1]))
