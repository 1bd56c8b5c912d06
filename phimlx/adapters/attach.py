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
from phimlx.checkpoint.head import EMBEDDING, HEAD
from phimlx.errors import CheckpointError, some
from phimlx.models.base import CausalLM
from phimlx.models.lora import (
    DEFAULT,
    EmbeddingLoRA,
    LoRA,
    LoRAEmbedding,
    LoRALinear,
    copy_name,
)
from phimlx.models.token_rows import RowsEmbedding, RowsLinear


def load_adapter(
    model: CausalLM,
    adapter: Adapter | str | Path,
    folder: Path | None = None,
    config: Mapping[str, Any] | None = None,
    name: str = DEFAULT,
) -> Adapter:
    """Put an adapter beside a model's layers; weights stay as they are but for those it replaces.

    Args:
        adapter: or the folder of one.
        folder, config: the model's, which tell its name.
        name: by which rows choose it. Only the default one may change more than projections.

    Returns:
        The adapter, in terms of this model's projections.

    Raises:
        ConfigError, CheckpointError: where it cannot be read, was made for another model, or
            changes what all rows share.
        GenerationError: where the default one does.
    """
    adapter = attach(model, adapter, folder, config, name)
    try:
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.settle()
        mx.eval(model.parameters())
    except BaseException:
        delete_adapter(model, name)
        raise
    return adapter


def attach(
    model: CausalLM,
    adapter: Adapter | str | Path,
    folder: Path | None = None,
    config: Mapping[str, Any] | None = None,
    name: str = DEFAULT,
) -> Adapter:
    """Do as `load_adapter` does, but read nothing of the model yet, whose weights are mapped."""
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter)
    adapter = fused(adapter, model)
    check_fit(adapter, model, folder, config)
    shared = _shared_changes(adapter)
    if name != DEFAULT:
        model.check_adapter(None)
        if shared:
            raise CheckpointError(
                f"The adapter changes {some(shared)}, which all requests share: only LoRA and DoRA "
                "of the layers' projections can be chosen by request.",
                hint="Load it alone, with the model: phimlx.load(…, adapter=…), or --adapter-path "
                "FOLDER.",
            )
    changes = resolved(adapter, model)
    model.is_changed |= bool(shared)
    if changes.own_head:
        model.untie()
    for parameter, values in changes.shared_weights.items():
        _replace(model, parameter, values)
    model.loaded_adapters |= {name}
    if adapter.modalities:
        model.loaded_routes.modalities[name] = frozenset(adapter.modalities)
    try:
        for own, layers in changes.copied.items():
            _put_copy(model, name, own, layers)
        for path, layer in changes.layers.items():
            _put(model, path, _adapted(model, path, layer, name))
    except BaseException:
        delete_adapter(model, name)
        raise
    for path, rows in changes.rows.items():
        kind = RowsEmbedding if path == EMBEDDING else RowsLinear
        _put(model, path, kind(module_at(model, path), rows))
    return adapter


def delete_adapter(model: CausalLM, name: str) -> None:
    """Take an adapter away that changes projections alone."""
    if model.leader is not None:
        model.leader.note("delete_adapter", name)
    model.loaded_adapters -= {name}
    model.loaded_routes.forget(name)
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            _put(model, path, module.without(name))


def _shared_changes(adapter: Adapter) -> list[str]:
    """List what an adapter changes beside the layers' projections, which no row can do without."""
    layers = [path for path in adapter.layers if path in (EMBEDDING, HEAD)]
    return [*adapter.shared_weights, *adapter.rows, *layers]


def _replace(model: CausalLM, name: str, values: mx.array) -> None:
    """Give a parameter other numbers; a quantized layer's weight makes it a plain layer."""
    path, _, part = name.rpartition(".")
    module = module_at(model, path)
    if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding) and part == "weight":
        plain: nn.Module = nn.Embedding(1, 1)
        if isinstance(module, nn.QuantizedLinear):
            plain = nn.Linear(1, 1, bias="bias" in module)
            if "bias" in module:
                plain.bias = module.bias
        plain.weight = values.astype(module.scales.dtype)
        _put(model, path, plain)
    elif model.architecture.is_projector(name):
        module[part] = values.astype(mx.float32)  # as it was trained
    else:
        module[part] = values.astype(module[part].dtype)
    if path == EMBEDDING and values.shape[0] != model.config.vocab_size:
        model.config = replace(model.config, vocab_size=values.shape[0])


def _put_copy(model: CausalLM, name: str, own: str, layers: Mapping[str, LoRA]) -> None:
    """Put a copy of one of the checkpoint's adapters beside it, the original where it has none."""
    copy = copy_name(name, own)
    model.loaded_routes.copies[name] = model.loaded_routes.copies.get(name, frozenset()) | {own}
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            if path in layers:
                _put(model, path, LoRALinear.adapted(module, layers[path], copy))
            else:
                module.alias(own, copy)


def _adapted(model: CausalLM, path: str, layer: LoRA, name: str) -> nn.Module:
    module = module_at(model, path)
    if isinstance(layer, EmbeddingLoRA):
        return LoRAEmbedding(module, layer)
    return LoRALinear.adapted(module, layer, name, always=path == HEAD)


def module_at(model: CausalLM, path: str) -> nn.Module:
    """The layer or norm at a path."""
    module: Any = model
    for key in path.split("."):
        module = module[int(key)] if isinstance(module, list) else module[key]
    assert isinstance(module, nn.Module)
    return module


def _put(model: CausalLM, path: str, module: nn.Module) -> None:
    model.update_modules(tree_unflatten([(path, module.eval())]))
