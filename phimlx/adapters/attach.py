"""Putting an adapter beside a model's layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from phimlx import catalog
from phimlx.adapters.adapter import LAYER, Adapter
from phimlx.adapters.files import CONFIG
from phimlx.adapters.read import read_adapter
from phimlx.checkpoint.tensors import PACKED_DTYPES
from phimlx.errors import CheckpointError, some
from phimlx.hub.layout import model_name
from phimlx.models.base import CausalLM
from phimlx.models.lora import LoRALinear, input_dims


def load_adapter(
    model: CausalLM,
    adapter: Adapter | str | Path,
    folder: Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> Adapter:
    """Put an adapter beside a model's layers; the model's own weights stay as they are.

    Args:
        adapter: or the folder of one.
        folder, config: the model's, which tell its name.

    Raises:
        ConfigError, CheckpointError: where it cannot be read, or was made for another model.
    """
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter)
    check_fit(adapter, model, folder, config)
    modules = dict(model.named_modules())
    for path, layer in adapter.layers.items():
        adapted = LoRALinear.adapted(modules[path], layer)
        adapted.eval()
        mx.eval(adapted.parameters())  # layer by layer: DoRA unpacks a whole weight for a moment
        model.update_modules(tree_unflatten([(path, adapted)]))
    if adapter.weights:
        own = dict(tree_flatten(model.parameters()))
        model.load_weights(
            [(name, array.astype(own[name].dtype)) for name, array in adapter.weights.items()],
            strict=False,
        )
        mx.eval(model.parameters())
    return adapter


def check_fit(
    adapter: Adapter,
    model: CausalLM,
    folder: Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Raise CheckpointError where an adapter was made for another model than this."""
    if model.placeholders is not None:
        raise CheckpointError(
            "Adapters go beside models that take text only: one that sees and hears switches "
            "between adapters of its own."
        )
    if adapter.base is not None and config is not None:
        known = catalog.by_config(config, model_name(folder) if folder else "")
        trained = catalog.by_config({**config, "_name_or_path": adapter.base.name})
        if known is not None and trained is not None and known != trained:
            raise CheckpointError(
                f"This adapter was trained on {trained.alias}, not on {known.alias}.",
                hint=f"Use it with --model {trained.alias}; to use it here all the same, take the "
                f"model's name out of its {CONFIG}.",
            )
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear) and LAYER.match(path)
    }
    _all_known(adapter.layers, layers, "layers")
    for path, layer in adapter.layers.items():
        width, height = input_dims(layers[path]), layers[path].weight.shape[0]
        wanted = {
            "lora_a": (layer.lora_a, (width, layer.rank)),
            "lora_b": (layer.lora_b, (layer.rank, height)),
            "m": (layer.magnitude, (height,)),
        }
        for part, (array, shape) in wanted.items():
            _same_shape(f"{path}.{part}", array, shape)
    parameters = dict(tree_flatten(model.parameters()))
    _all_known(adapter.weights, parameters, "weights")
    for name, array in adapter.weights.items():
        if parameters[name].dtype in PACKED_DTYPES:
            raise CheckpointError(
                f"The adapter replaces {name}, which is quantized here.",
                hint="Full fine-tuning goes with the model that it started from, not quantized.",
            )
        _same_shape(name, array, parameters[name].shape)


def _all_known(names: Iterable[str], known: Mapping[str, Any], what: str) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        targets = {m[2] for name in known if (m := LAYER.match(name))} if what == "layers" else ()
        hint = f"Layers that can be adapted: {', '.join(sorted(targets))}." if targets else None
        raise CheckpointError(
            f"The adapter changes {some(unknown)}, which is none of this model's {what} that an "
            "adapter can change.",
            hint=hint,
        )


def _same_shape(name: str, array: mx.array | None, shape: tuple[int, ...]) -> None:
    if array is not None and array.shape != shape:
        raise CheckpointError(
            f"The adapter was made for another model: {name} has shape {list(array.shape)}, and "
            f"this one needs {list(shape)}."
        )
