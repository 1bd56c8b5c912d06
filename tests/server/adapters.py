"""Adapters of nano for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from phimlx.adapters.adapter import Adapter
from phimlx.adapters.peft import write_peft
from phimlx.api import Phi
from phimlx.models.lora import LoRA


def write_adapter(folder: Path, nano: Phi, seed: int, **config: Any) -> Path:
    """Write a LoRA with random numbers; `config` is put over its own."""
    layers: dict[str, LoRA] = {}
    for number in range(len(nano.model.layers)):
        for projection, (width, height) in nano.model.config.projection_shapes.items():
            a, b = mx.random.split(mx.random.key(1000 * seed + len(layers)))
            layers[f"model.layers.{number}.{projection}"] = LoRA(
                0.2 * mx.random.normal((width, 4), key=a),
                0.2 * mx.random.normal((4, height), key=b),
                1.0,
            )
    write_peft(folder, Adapter(layers))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder
