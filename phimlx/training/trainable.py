"""Parameters that a fine-tuning trains: adapters beside some layers, or the layers themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from phimlx.adapters.adapter import Adapter, Base
from phimlx.errors import TrainingError, shortened
from phimlx.models.base import CausalLM
from phimlx.models.lora import LoRA, input_dims
from phimlx.training.forward import Dropout
from phimlx.training.settings import TrainSettings, matches


@dataclass(frozen=True)
class Counts:
    """Numbers that a model has, however they are stored, and that are trained."""

    trained: int
    total: int


def attach(model: CausalLM, settings: TrainSettings) -> Counts:
    """Freeze a model but for what is to be trained; adapters, in float32, are put in its layers.

    The layers are mlx-lm's LoRALinear and DoRALinear, over plain and quantized weights. Before
    the first step the model answers as it did.

    Raises:
        TrainingError: where a target or layer does not exist, or the model cannot be trained so.
    """
    if model.architecture.adapters:
        raise TrainingError(
            "A model whose checkpoint holds adapters of its own cannot be fine-tuned yet.",
            hint="Fine-tune one without, such as phi-4-mini.",
        )
    chosen = _chosen(settings, len(model.layers))
    paths = [path for path, _ in _targets(model, settings, chosen)]
    if settings.trains_whole_layers:
        _unfreeze(model, settings, chosen)
        return counts(model)
    if not paths:
        where = f"layer {chosen[0]}" if len(chosen) == 1 else f"layers {chosen[0]} to {chosen[-1]}"
        raise TrainingError(
            f"No projection of those in targets is in {where}.",
            hint="Train more layers, or other projections.",
        )
    model.freeze()
    keys = mx.random.split(mx.random.key(settings.seed), len(paths))
    for (path, linear), key in zip(_targets(model, settings, chosen), keys, strict=True):
        adapted = _adapted(linear, settings, key)
        mx.eval(adapted.trainable_parameters())  # DoRA unpacks a whole weight for a moment
        model.update_modules(tree_unflatten([(path, adapted)]))
    return counts(model)


def adapter_of(model: CausalLM, settings: TrainSettings, base: Base | None = None) -> Adapter:
    """Return what has been trained in a model that `attach` prepared, ready to be written."""
    about: dict[str, Any] = {"base": base, "blocks": len(model.layers)}
    if settings.trains_whole_layers:
        return Adapter(weights=dict(tree_flatten(model.trainable_parameters())), **about)
    layers = {
        path: LoRA(module.lora_a, module.lora_b, module.scale, module.get("m"))
        for path, module in _adapted_layers(model)
    }
    return Adapter(layers, dropout=settings.dropout, **about)


def counts(model: nn.Module) -> Counts:
    """Count the numbers that a model has, and those of them that are not frozen."""
    trained = dict(tree_flatten(model.trainable_parameters()))
    total = sum(_size(module) for module in model.modules())
    return Counts(sum(array.size for array in trained.values()), total)


def _size(module: nn.Module) -> int:
    """Count the numbers that a module itself has."""
    if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return module.weight.size * 32 // module.bits
    own = (value for name, value in module.items() if not name.startswith("_"))
    return sum(value.size for value in own if isinstance(value, mx.array))


def _chosen(settings: TrainSettings, count: int) -> range:
    """The numbers of the layers to train."""
    first, last = 0, count - 1
    if settings.layers is not None:
        first, last = settings.layers
    elif settings.num_layers > 0:
        first = count - settings.num_layers
    if not 0 <= first <= last < count:
        said = settings.num_layers if settings.layers is None else list(settings.layers)
        name = "num_layers" if settings.layers is None else "layers"
        raise TrainingError(
            f"{name} is {shortened(said)}, but this model has {count} layers, 0 to {count - 1}."
        )
    return range(first, last + 1)


def _targets(
    model: CausalLM, settings: TrainSettings, chosen: range
) -> Iterator[tuple[str, nn.Module]]:
    """Path and layer of each projection to train."""
    projections = model.architecture.projections
    for pattern in settings.targets:
        if not any(matches(pattern, name) for name in projections):
            names = [name.rpartition(".")[2] for name in projections]
            fused = model.architecture.fused_projections
            instead = next((own for own, parts in fused.items() if pattern in parts), None)
            raise TrainingError(
                f"There is no projection {shortened(pattern)} to train; there is "
                f"{', '.join(names)}.",
                hint=None if instead is None else f"{pattern} is part of {instead} here.",
            )
    for number in chosen:
        modules = dict(model.layers[number].named_modules())
        for name in projections:
            if settings.adapts(name) and name in modules:
                yield f"model.layers.{number}.{name}", modules[name]


def _adapted(linear: nn.Module, settings: TrainSettings, key: mx.array) -> nn.Module:
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    width, height = input_dims(linear), linear.weight.shape[0]
    kind = DoRALinear if settings.fine_tune_type == "dora" else LoRALinear
    # Not its from_base, which takes the width of weights at 3, 5 or 6 bits for another.
    adapted: nn.Module = kind(width, height, settings.rank, scale=settings.scale)
    if settings.fine_tune_type == "dora":
        adapted.set_linear(linear)
    else:
        adapted.linear = linear
    bound = 1 / math.sqrt(width)
    adapted.lora_a = mx.random.uniform(-bound, bound, (width, settings.rank), key=key)
    adapted.dropout = Dropout(settings.dropout) if settings.dropout else nn.Identity()
    return adapted


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if "lora_a" in module:
            yield path, module


def _unfreeze(model: CausalLM, settings: TrainSettings, chosen: range) -> None:
    """Make a model's own weights trainable: all of them, or those of some layers."""
    if settings.targets:
        raise TrainingError(
            "targets goes with lora and dora: full fine-tuning trains whole layers."
        )
    if any(isinstance(m, nn.QuantizedLinear | nn.QuantizedEmbedding) for m in model.modules()):
        raise TrainingError(
            "This model is quantized; full fine-tuning needs one that is not.",
            hint="Use lora or dora, or make plain weights of it: phimlx convert MODEL --mlx-path "
            "OUT --dequantize",
        )
    model.freeze()
    if settings.trains_every_layer:
        model.unfreeze()
    for number in chosen:
        model.layers[number].unfreeze()
