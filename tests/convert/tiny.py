"""Tiny model folders, whole or broken on purpose, for tests of what reads and converts them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from convert import ConversionRequest, convert, plan_conversion
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model
from phimlx.errors import ConversionError

PHI_4: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 2,
}
MINI: dict[str, Any] = {
    **PHI_4,
    "original_max_position_embeddings": 32,
    "partial_rotary_factor": 0.75,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 6,
        "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
    },
    "tie_word_embeddings": True,
}


def parameters(config: Mapping[str, Any], dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """Weights for a config, no two alike, the same on every machine."""
    weights = {}
    for index, (name, array) in enumerate(tree_flatten(build_model(config).parameters())):
        count = mx.arange(array.size, dtype=mx.uint32) + 7919 * index
        noise = (count * 2654435761) >> 20  # the top 12 bits: 0 … 4095
        weights[name] = ((noise.astype(mx.float32) - 2048) / 16384).reshape(array.shape)
        if "norm" in name:
            weights[name] = weights[name] + 1
    return {name: array.astype(dtype) for name, array in weights.items()}


def write_model(
    folder: Path,
    config: Mapping[str, Any] = PHI_4,
    weights: Mapping[str, mx.array] | None = None,
    shards: int = 1,
) -> Path:
    """A model folder in Hub layout: config.json and `shards` weight files, with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    weights = parameters(config) if weights is None else weights
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), dict(weights), {"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        members = dict(list(weights.items())[shard::shards])
        mx.save_safetensors(str(folder / file_name), members, {"format": "pt"})
        weight_map.update(dict.fromkeys(members, file_name))
    write_index(folder, weight_map)
    return folder


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def write_index(folder: Path, weight_map: Any) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_safetensors(
    file: Path, header: Any, data: bytes = b"", length: int | None = None
) -> None:
    """A safetensors file as it comes: `header` is encoded unless it is bytes already."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def bytes_of(array: mx.array) -> bytes:
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    return bytes(memoryview(mx.contiguous(array).view(words)))


def same_bits(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and bytes_of(a[name]) == bytes_of(b[name])
        for name in a
    )


def weights_of(folder: Path) -> dict[str, mx.array]:
    return Checkpoint(folder).weights()


def plan(source: Path, out: Path, *arguments: Any, files: Any = None, **keywords: Any) -> Any:
    """Plan a conversion; arguments as `convert` takes them."""
    return plan_conversion(ConversionRequest(source, out, *arguments, **keywords), files)


def failing(source: Path, out: Path, *arguments: Any, **keywords: Any) -> ConversionError:
    """The error that a conversion ends with; nothing is left behind."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    with pytest.raises(ConversionError) as caught:
        convert(source, out, *arguments, **keywords)
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else None) == before
    return caught.value
