"""Reference logits of a multimodal model with live adapters, by transformers and peft in float32.

    python scripts/goldens/mm_goldens.py tests/goldens/mm-native

Writes a tiny random model in transformers' own layout, its adapters as peft saves them, and a
`reference.safetensors` that `phimlx.evaluation.parity` repeats. Needs torch, transformers and peft,
which phimlx itself never does.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

SEED = 20262
EXACT = 1e-4
STEP = 96
IMAGE, AUDIO, VOCABULARY = 60, 61, 64
SIDE, PATCH = 16, 2  # pixels of a crop, and of a patch: 8 patches and 4 tokens a side

CONFIG = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "original_max_position_embeddings": STEP, "tie_word_embeddings": True, "sliding_window": None,
    "bos_token_id": 1, "eos_token_id": [1], "pad_token_id": 1,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": STEP,
        "short_factor": [1.0] * 6, "long_factor": [1.0, 4.0, 7.0, 10.0, 13.0, 16.0],
    },
    "vision_config": {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "patch_size": PATCH, "image_size": SIDE, "crop_size": SIDE,
        "image_token_id": IMAGE,
    },
    "audio_config": {
        "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 16, "num_blocks": 2,
        "ext_pw_out_channel": 24, "depthwise_separable_out_channel": 24,
        "nemo_conv_channels": 12, "bias_max_distance": 500, "audio_token_id": AUDIO,
    },
}  # fmt: skip
TARGETS = r"model\.layers\.\d+\.((self_attn\.(qkv|o)_proj)|(mlp\.(gate_up|down)_proj))"
ADAPTERS = {"vision": (4, 10), "speech": (6, 9)}  # rank and alpha: scales that are no powers of two

# Each picture: its grid of crops, and its height and width in patches.
PICTURES = {"one": [(1, 1, 8, 8)], "two": [(1, 2, 5, 16), (2, 1, 11, 8)]}
FRAMES = 77
# Name, pictures, whether there is a sound, words before and after, adapter.
CASES: list[tuple[str, str | None, bool, int, int, str | None]] = [
    ("text", None, False, 20, 20, None),
    ("text (long table)", None, False, 60, 60, None),
    ("image", "one", False, 5, 10, "vision"),
    ("image (long table)", "one", False, 70, 10, "vision"),
    ("two images (long table)", "two", False, 5, 9, "vision"),
    ("audio", None, True, 5, 10, "speech"),
    ("audio (long table)", None, True, 70, 40, "speech"),
    ("image and audio", "one", True, 5, 10, "vision"),
    ("image and audio (long table)", "one", True, 40, 40, "vision"),
]


def make_model(folder: Path) -> Phi4MultimodalForCausalLM:
    """A random model, saved, whose adapters change everything; rounded to bfloat16 as stored."""
    torch.manual_seed(SEED)
    # With its fused attention transformers lets a picture without padding see leftwards only, which
    # the published code never does.
    config = Phi4MultimodalConfig(**CONFIG, attn_implementation="eager")
    model = Phi4MultimodalForCausalLM(config).eval()
    fill(model)
    shutil.rmtree(folder, ignore_errors=True)
    # A copy, since the frequencies would be rounded as well.
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    for name, (rank, alpha) in ADAPTERS.items():
        model.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, lora_dropout=0.0), name
        )
        for path, weight in model.named_parameters():
            if f".{name}." in path and ".lora_" in path:
                weight.data = (0.25 * torch.randn_like(weight)).bfloat16().float()
        model.set_adapter(name)
        model.save_pretrained(folder / f"{name}-lora")
    return model


def fill(model: torch.nn.Module) -> None:
    """Numbers far larger than at initialisation, so that every part is seen in the logits."""
    for path, array in [*model.named_parameters(), *model.named_buffers()]:
        if array.dtype != torch.float32 or "inv_freq" in path:
            continue
        norm = array.dim() == 1 and path.endswith("weight")
        random = torch.randn_like(array)
        values = 1 + 0.1 * random if norm or "invstd" in path else 0.15 * random
        array.data.copy_(values.bfloat16().float())


def picture_arrays(name: str) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Pixels, grid sizes and masks of a group of pictures, and how many tokens each has."""
    group = PICTURES[name]
    patches = SIDE // PATCH
    crops = 1 + max(rows * columns for rows, columns, *_ in group)
    pixels = torch.randint(-128, 128, (len(group), crops, 3, SIDE, SIDE)) / 128
    mask = torch.zeros(len(group), crops, patches, patches)
    tokens = []
    for index, (rows, columns, height, width) in enumerate(group):
        whole = torch.zeros(rows * patches, columns * patches)
        whole[:height, :width] = 1
        grid = whole.reshape(rows, patches, columns, patches).transpose(1, 2)
        mask[index, 0] = 1
        mask[index, 1 : 1 + rows * columns] = grid.reshape(-1, patches, patches)
        down, across = -(-height // 2), -(-width // 2)
        tokens.append(down * (across + 1) + 1 + (patches // 2) * (patches // 2 + 1))
    sizes = torch.tensor([[rows * SIDE, columns * SIDE] for rows, columns, *_ in group])
    return {
        "input_image_embeds": pixels, "image_sizes": sizes, "image_attention_mask": mask,
    }, tokens  # fmt: skip


def words(count: int) -> list[int]:
    return torch.randint(2, IMAGE, (count,)).tolist()


# Our names, which are the published processor's, and transformers'.
NAMES = {
    "input_image_embeds": "image_pixel_values",
    "image_sizes": "image_sizes",
    "image_attention_mask": "image_attention_mask",
    "input_audio_embeds": "audio_input_features",
    "audio_embed_sizes": "audio_embed_sizes",
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    model = make_model(folder)
    arrays: dict[str, torch.Tensor] = {}
    cases: list[dict[str, Any]] = []
    for number, (name, pictures, sound, before, after, adapter) in enumerate(CASES):
        given: dict[str, torch.Tensor] = {}
        tokens = words(before)
        if pictures is not None:
            images, counts = picture_arrays(pictures)
            given |= images
            for count in counts:
                tokens += [IMAGE] * count + words(1)
        if sound:
            given["input_audio_embeds"] = torch.randn(1, FRAMES, 80).half().float()
            given["audio_embed_sizes"] = torch.tensor([-(-FRAMES // 8)])
            tokens += [AUDIO] * -(-FRAMES // 8)
        tokens += words(after)
        assert ("long" in name) == (len(tokens) > STEP)
        if adapter is None:
            model.disable_adapters()
        else:
            model.enable_adapters()
            model.set_adapter(adapter)
        ids = torch.tensor([tokens])
        with torch.no_grad():
            logits = model(ids, **{NAMES[key]: array for key, array in given.items()}).logits[0]
        assert torch.isfinite(logits).all()
        stored = {"input_ids": ids, "logits": logits, **given}
        arrays |= {f"{number}.{key}": array for key, array in stored.items()}
        cases.append(
            {
                "name": f"{name}, {len(tokens)} tokens", "run": "media", "dtype": "float32",
                "bits": None, "allowed": EXACT,
                **{key: f"{number}.{key}" for key in ("input_ids", "logits")},
                "media": {key: f"{number}.{key}" for key in given},
            }
        )  # fmt: skip
    packed = {
        key: array.int() if array.dtype == torch.int64 else array for key, array in arrays.items()
    }
    save_file(packed, folder / "reference.safetensors", {"cases": json.dumps(cases)})
    for name in ("README.md", "generation_config.json"):
        for file in folder.rglob(name):
            file.unlink()
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {len(cases)} cases, {np.round(size / 1e6, 2)} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
