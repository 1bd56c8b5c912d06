"""What a fine-tuning trains: low-rank adapters beside some layers, or the layers themselves.

Knows a model's layers; knows nothing of data, steps or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from phimlx.adapters.adapter import KINDS, Adapter, Base
from phimlx.errors import TrainingError, shortened
from phimlx.models.base import CausalLM
from phimlx.models.lora import MAX_RANK, LoRA, input_dims
from phimlx.training.forward import Dropout

SCALE = 2.0  # alpha twice the rank, where nothing is said


@dataclass(frozen=True)
class AdapterSettings:
    """What to train.

    Attributes:
        kind: "lora", "dora", or "full" for the weights themselves.
        rank: of A and B.
        alpha: makes the scale alpha / rank.
        scale: of B A, instead of alpha; 2 where neither is given.
        dropout: part of an adapter's input that is zeroed.
        rslora: alpha makes the scale alpha / √rank (arXiv 2312.03732).
        targets: names of projections, or patterns of them (`*_proj`); all where empty.
        num_layers: so many of the last layers; all where None.
        layers: or those from the first of these numbers to the second, both included.
        seed: for the numbers that A starts with.

    Raises:
        TrainingError: for values that are impossible, or contradict each other.
    """

    kind: str = "lora"
    rank: int = 16
    alpha: float | None = None
    scale: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] = ()
    num_layers: int | None = None
    layers: tuple[int, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TrainingError(
                f"The kind of fine-tuning is {shortened(self.kind)}, not one of {', '.join(KINDS)}."
            )
        if not _is(self.rank, int) or not 0 < self.rank <= MAX_RANK:
            raise TrainingError(
                f"rank is {shortened(self.rank)}, not a whole number from 1 to {MAX_RANK}."
            )
        for name in ("alpha", "scale"):
            value = getattr(self, name)
            if value is not None and (not _is(value, int | float) or not 0 < value < math.inf):
                raise TrainingError(f"{name} is {shortened(value)}, not a number above 0.")
        if self.alpha is not None and self.scale is not None:
            raise TrainingError("alpha and scale say the same thing: give one of them.")
        if self.rslora and self.alpha is None:
            raise TrainingError("rslora goes with alpha, which it divides by the root of the rank.")
        if not _is(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise TrainingError(
                f"dropout is {shortened(self.dropout)}, not a number from 0 up to 1."
            )
        if self.num_layers is not None and self.layers is not None:
            raise TrainingError("num_layers and layers exclude each other.")
        if self.num_layers is not None and (not _is(self.num_layers, int) or self.num_layers < 1):
            raise TrainingError(
                f"num_layers is {shortened(self.num_layers)}, not a whole number above 0."
            )

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        if self.alpha is None:
            return SCALE if self.scale is None else self.scale
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Counts:
    """How many numbers a model has, however they are stored, and how many are trained."""

    trained: int
    total: int


def attach(model: CausalLM, settings: AdapterSettings) -> Counts:
    """Freeze a model but for what is to be trained; adapters, in float32, are put in its layers.

    The layers are mlx-lm's LoRALinear and DoRALinear, over plain and quantized weights. Before
    the first step the model answers as it did.

    Raises:
        TrainingError: where a target or layer does not exist, or the model cannot be trained so.
    """
    if model.placeholders is not None:
        raise TrainingError(
            "A model that sees and hears cannot be fine-tuned yet.",
            hint="Fine-tune one that takes text only, such as phi-4-mini.",
        )
    chosen = _chosen(settings, len(model.layers))
    paths = [path for path, _ in _targets(model, settings, chosen)]
    if settings.kind == "full":
        _unfreeze(model, settings, chosen)
        return counts(model)
    model.freeze()
    keys = mx.random.split(mx.random.key(settings.seed), len(paths))
    for (path, linear), key in zip(_targets(model, settings, chosen), keys, strict=True):
        adapted = _adapted(linear, settings, key)
        mx.eval(adapted.trainable_parameters())  # DoRA unpacks a whole weight for a moment
        model.update_modules(tree_unflatten([(path, adapted)]))
    return counts(model)


def adapter_of(model: CausalLM, settings: AdapterSettings, base: Base | None = None) -> Adapter:
    """What has been trained in a model that `attach` prepared, ready to be written."""
    about: dict[str, Any] = {"base": base, "blocks": len(model.layers)}
    if settings.kind == "full":
        return Adapter(weights=dict(tree_flatten(model.trainable_parameters())), **about)
    layers = {
        path: LoRA(module.lora_a, module.lora_b, module.scale, module.get("m"))
        for path, module in _adapted_layers(model)
    }
    return Adapter(layers, dropout=settings.dropout, **about)


def restore(model: CausalLM, adapter: Adapter) -> None:
    """Go on from an adapter: its numbers take the place of those that `attach` began with.

    Raises:
        TrainingError: where it has other layers, another rank or another scale.
    """
    trained = dict(tree_flatten(model.trainable_parameters()))
    wanted = {name: array.shape for name, array in trained.items()}
    given = {name: array.shape for name, array in adapter.arrays.items()}
    scales = {layer.scale for layer in adapter.layers.values()}
    own = {module.scale for _, module in _adapted_layers(model)}
    if wanted != given or scales != own:
        raise TrainingError(
            "The adapter to go on from has other layers, another rank, scale or kind than this "
            "run's settings.",
            hint="Use the settings that it was made with; its adapter_config.json tells them.",
        )
    model.load_weights(
        [(name, array.astype(mx.float32)) for name, array in adapter.arrays.items()]
        if adapter.layers
        else list(adapter.weights.items()),
        strict=False,
    )
    mx.eval(model.trainable_parameters())


def counts(model: nn.Module) -> Counts:
    """How many numbers a model has, and how many of them are not frozen."""
    trained = dict(tree_flatten(model.trainable_parameters()))
    total = sum(_size(module) for module in model.modules())
    return Counts(sum(array.size for array in trained.values()), total)


def _size(module: nn.Module) -> int:
    """How many numbers a module itself has."""
    if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return module.weight.size * 32 // module.bits
    own = (value for name, value in module.items() if not name.startswith("_"))
    return sum(value.size for value in own if isinstance(value, mx.array))


def _chosen(settings: AdapterSettings, count: int) -> range:
    """The numbers of the layers to train."""
    first, last = 0, count - 1
    if settings.num_layers is not None:
        first = count - settings.num_layers
    elif settings.layers is not None:
        first, last = settings.layers
    if not 0 <= first <= last < count:
        said = settings.num_layers if settings.layers is None else list(settings.layers)
        name = "num_layers" if settings.layers is None else "layers"
        raise TrainingError(
            f"{name} is {shortened(said)}, but this model has {count} layers, 0 to {count - 1}."
        )
    return range(first, last + 1)


def _targets(
    model: CausalLM, settings: AdapterSettings, chosen: range
) -> Iterator[tuple[str, nn.Module]]:
    """Path and layer of each projection to train."""
    projections = model.architecture.projections
    for pattern in settings.targets:
        if not any(_matches(pattern, name) for name in projections):
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
            if not settings.targets or any(_matches(each, name) for each in settings.targets):
                yield f"model.layers.{number}.{name}", modules[name]


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def _adapted(linear: nn.Module, settings: AdapterSettings, key: mx.array) -> nn.Module:
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    width, height = input_dims(linear), linear.weight.shape[0]
    kind = DoRALinear if settings.kind == "dora" else LoRALinear
    # Not its from_base, which takes the width of weights at 3, 5 or 6 bits for another.
    adapted: nn.Module = kind(width, height, settings.rank, scale=settings.scaling)
    if settings.kind == "dora":
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


def _unfreeze(model: CausalLM, settings: AdapterSettings, chosen: range) -> None:
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
    if settings.num_layers is None and settings.layers is None:
        model.unfreeze()
    for number in chosen:
        model.layers[number].unfreeze()


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
