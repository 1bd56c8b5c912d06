"""The tiny reasoning-vision checkpoint with a tokenizer of bytes, so that text goes in and out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests.prompt.conftest import tiny_tokenizer_json

TINY = Path("tiny", "tiny-phi4-siglip")
PUBLISHED = Path("hf", "Phi-4-reasoning-vision-15B")
TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_sep|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<|dummy_84|>",
)
IMAGE = -200


def reasoning_vision_folder(
    data: Path, folder: Path, least: int | None = None, **config: Any
) -> Path:
    """Put a model that sees and babbles into `folder`.

    Args:
        least: patches of a picture; as published where None.
        config: other values for config.json.
    """
    shutil.copyfile(data / TINY / "model.safetensors", folder / "model.safetensors")
    about = json.loads((data / TINY / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(about))
    for name in ("chat_template.jinja", "preprocessor_config.json"):
        shutil.copyfile(data / PUBLISHED / name, folder / name)
    if least is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps({"min_num_patches": least}))
    (folder / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json(TOKENS)))
    return folder


def media(data: Path, names: list[str]) -> dict[str, mx.array]:
    """What the model takes of the checkpoint's pictures."""
    from phimlx.media.naflex import prepare_patches

    files = [data / TINY / "pictures" / f"{name}.png" for name in names]
    return {name: mx.array(array) for name, array in prepare_patches(files).arrays().items()}


def picture(seed: int = 0, width: int = 200, height: int = 100) -> np.ndarray[Any, Any]:
    """Noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
