"""A tiny model in a folder, with nano's tokenizer, and rows to train it on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from phimlx.checkpoint.load import build_model
from phimlx.hub.resolve import NANO

COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_tiny(folder: Path, **changes: int) -> Path:
    """A model of random weights in float32.

    Args:
        changes: of its config.
    """
    folder.mkdir()
    config = json.loads((NANO / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "torch_dtype": "float32"}
    config |= {"rope_scaling": None, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    for name in COPIED:
        shutil.copyfile(NANO / name, folder / name)
    mx.random.seed(3)
    weights = dict(tree_flatten(build_model(config).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def write_rows(path: Path, count: int = 24) -> Path:
    """Questions of different lengths, each with its answer."""
    rows = [
        {"prompt": "Say " + "so " * (i % 7) + f"{i}.", "completion": f"{i} " * (1 + i % 3)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
