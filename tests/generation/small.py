"""A small random model in a folder, without a tokenizer, with its LongRoPE step at 400 tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from phimlx.checkpoint.load import build_model

STEP = 400

CONFIG: dict[str, Any] = {
    "model_type": "phi3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 96, "vocab_size": 500,
    "max_position_embeddings": 4000, "original_max_position_embeddings": STEP,
    "partial_rotary_factor": 0.75, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "eos_token_id": 499,
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 12, "long_factor": [2.0 + i for i in range(12)],
    },
}  # fmt: skip


def make_model(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Write the model."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**CONFIG, **config}
    (folder / "config.json").write_text(json.dumps(whole))
    mx.random.seed(seed)
    weights: Any = tree_flatten(build_model(whole).parameters())
    arrays = {name: mx.random.normal(array.shape) * 0.1 for name, array in weights}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    return folder


def words(count: int, start: int = 3) -> list[int]:
    """Tokens without a pattern that a draft would find."""
    return [3 + (start * 31 + i * i * 7 + i) % 490 for i in range(count)]
