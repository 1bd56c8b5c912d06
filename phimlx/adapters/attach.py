"""Putting an adapter beside a model's layers, or in place of some of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from phimlx.adapters.adapter import Adapter
from phimlx.adapters.fit import check_fit
from phimlx.adapters.read import read_adapter
from phimlx.adapters.resolve import resolved
from phimlx.adapters.split import fused
from phimlx.checkpoint.head import EMBEDDING
from phimlx.models.base import CausalLM
from phimlx.models.lora import EmbeddingLoRA, LoRA, LoRAEmbedding, LoRALinear
from phimlx.models.token_rows import RowsEmbedding, RowsLinear


def load_adapter(
    model: CausalLM,
    adapter: Adapter | str | Path,
    folder: Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> Adapter:
    """Put an adapter beside a model's layers; weights stay as they are but for those it replaces.

    Args:
        adapter: or the folder of one.
        folder, config: the model's, which tell its name.

    Raises:
        ConfigError, CheckpointError: where it cannot be read, or was made for another model.
    """
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter)
    adapter = fused(adapter, model)
    check_fit(adapter, model, folder, config)
    changes = resolved(adapter, model)
    if changes.own_head:
        model.untie()
    for name, values in changes.weights.items():
        _replace(model, name, values)
    mx.eval(model.parameters())
    for path, layer in changes.layers.items():
        _put(model, path, _adapted(_module(model, path), layer))
    for path, rows in changes.rows.items():
        kind = RowsEmbedding if path == EMBEDDING else RowsLinear
        _put(model, path, kind(_module(model, path), rows))
    return adapter


def _replace(model: CausalLM, name: str, values: mx.array) -> None:
    """Give a parameter other numbers; a quantized layer's weight makes it a plain layer."""
    path, _, part = name.rpartition(".")
    module = _module(model, path)
    if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding) and part == "weight":
        plain: nn.Module = nn.Embedding(1, 1)
        if isinstance(module, nn.QuantizedLinear):
            plain = nn.Linear(1, 1, bias="bias" in module)
            if "bias" in module:
                plain.bias = module.bias
        plain.weight = values.astype(module.scales.dtype)
        _put(model, path, plain)
    else:
        module[part] = values.astype(module[part].dtype)
    if path == EMBEDDING and values.shape[0] != model.config.vocab_size:
        model.config = replace(model.config, vocab_size=values.shape[0])


def _adapted(module: nn.Module, layer: LoRA) -> nn.Module:
    if isinstance(layer, EmbeddingLoRA):
        return LoRAEmbedding(module, layer)
    return LoRALinear.adapted(module, layer)


def _module(model: CausalLM, path: str) -> nn.Module:
    """The layer or norm at a path."""
    module: Any = model
    for key in path.split("."):
        module = module[int(key)] if isinstance(module, list) else module[key]
    assert isinstance(module, nn.Module)
    return module


def _put(model: CausalLM, path: str, module: nn.Module) -> None:
    module.eval()
    mx.eval(module.parameters())  # layer by layer: DoRA unpacks a whole weight for a moment
    model.update_modules(tree_unflatten([(path, module)]))
