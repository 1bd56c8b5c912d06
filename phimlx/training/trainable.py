"""Parameters that a fine-tuning trains: adapters beside some layers, or the layers themselves."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from phimlx.adapters.adapter import COPY, Adapter, Base
from phimlx.adapters.attach import module_at
from phimlx.adapters.mlx_lm import MODALITIES
from phimlx.errors import TrainingError, shortened
from phimlx.models.base import CausalLM
from phimlx.models.lora import LoRA, LoRALinear, dequantized_weight, input_dims, is_quantized
from phimlx.models.shares import Share
from phimlx.training.forward import Dropout
from phimlx.training.settings import Part, TrainSettings, matches
from phimlx.training.sharded import ShardedLoRA

OWN_ADAPTERS = {"vision-adapter": "vision", "speech-adapter": "speech"}


@dataclass(frozen=True)
class Counts:
    """Numbers that a model has, however they are stored, and that are trained."""

    trained: int
    total: int


def attach(model: CausalLM, settings: TrainSettings, held: Collection[str] = ("text",)) -> Counts:
    """Freeze a model but for what is to be trained; adapters, in float32, are put in its layers.

    The layers are mlx-lm's LoRALinear and DoRALinear, over plain and quantized weights. Before
    the first step the model answers as it did.

    Args:
        held: what the rows hold, see `Example.held`.

    Raises:
        TrainingError: where a target or layer does not exist, or the model cannot be trained so.
    """
    parts = trained_parts(model, settings, held)
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
    for own in (own for part, own in OWN_ADAPTERS.items() if part in parts):
        for _, module in _targets(model, settings, chosen):
            _continue(module, own)
    if "projector" in parts:
        _train_projectors(model, held)
    if "new" not in parts:
        return counts(model)
    keys = mx.random.split(mx.random.key(settings.seed), len(paths))
    for (path, linear), key in zip(_targets(model, settings, chosen), keys, strict=True):
        if isinstance(linear, LoRALinear):
            # The checkpoint's own adapters come after it, as they do beside a loaded one.
            linear.base_layer = _adapted(linear.base_layer, settings, key)
            mx.eval(linear.base_layer.trainable_parameters())
            continue
        share = None if model.shares is None else model.shares.projections[path.split(".", 3)[3]]
        adapted = _adapted(linear, settings, key, share)
        mx.eval(adapted.trainable_parameters())  # DoRA unpacks a whole weight for a moment
        model.update_modules(tree_unflatten([(path, adapted)]))
    return counts(model)


def trained_parts(
    model: CausalLM, settings: TrainSettings, held: Collection[str]
) -> tuple[str, ...]:
    """Decide what is trained of a model, given what the rows hold.

    Raises:
        TrainingError: where the model has no such part, or the rows would not reach it.
    """
    if settings.method == "kto" and set(held) - {"text"}:
        raise TrainingError(
            "--method kto puts the answers of others to each prompt, which it does for text alone.",
            hint="Take rows of chosen and rejected answers: --method dpo, orpo, simpo or cpo.",
        )
    has_own, projectors = model.architecture.adapters, model.architecture.projectors
    if settings.train:
        for part in settings.train:
            missing = not projectors if part == "projector" else part != "new" and not has_own
            if missing:
                raise TrainingError(
                    f"The model has no {part} to train.",
                    hint="Leave --train out: a new adapter is what is trained then.",
                )
    if settings.trains_whole_layers:
        if has_own or settings.train:
            raise TrainingError(
                "Full fine-tuning changes what all rows share, and this model's adapters belong to "
                "it as it is.",
                hint="Leave --fine-tune-type out: its adapters are trained then, or a new one.",
            )
        return ()
    parts = settings.train
    if not parts and has_own:
        own: dict[str, Part] = {"image": "vision-adapter", "audio": "speech-adapter"}
        parts = tuple(part for kind, part in own.items() if kind in held) or ("new",)
    parts = parts or ("new",)
    reached = {"vision-adapter": {"image"}, "speech-adapter": {"audio"}, "projector": {*projectors}}
    for part in parts:
        needed = reached.get(part)
        if needed is not None and not needed & set(held):
            what = {"image": "a picture", "audio": "a sound without a picture"}
            lacking = " or ".join(what[each] for each in what if each in needed)
            raise TrainingError(
                f"No row holds {lacking}, so that the {part} would learn nothing.",
                hint="Leave it out of --train, or add such rows.",
            )
    if settings.learns_by.has_reference and len(parts) > 1 and "new" in parts:
        raise TrainingError(
            f"--method {settings.method} compares with the model before training, and a new "
            "adapter beside other parts is not taken out alone.",
            hint="Train one of them: --train new, or the others without it.",
        )
    if "new" not in parts:
        for name, given in (("dropout", settings.dropout), ("dora", _is_dora(settings))):
            if given:
                raise TrainingError(
                    f"{name} goes with a new adapter, and the model's own is trained further.",
                    hint="Leave it out, or train a new one: --train new",
                )
    return parts


def _is_dora(settings: TrainSettings) -> bool:
    return settings.fine_tune_type == "dora"


def _continue(module: nn.Module, own: str) -> None:
    """Make one of the checkpoint's adapters trainable, in float32."""
    if not isinstance(module, LoRALinear) or module.scale_of(own) is None:
        return
    for part in (module.lora_A, module.lora_B):
        weight = dequantized_weight(part[own])
        part[own] = nn.Linear(1, 1, bias=False)
        part[own].weight = weight
        mx.eval(weight)


def _train_projectors(model: CausalLM, held: Collection[str]) -> None:
    """Make what turns features into tokens trainable, in float32, of the kinds that rows hold."""
    modules = dict(model.named_modules())
    for path, linear in modules.items():
        name = f"{path}.weight"
        if not isinstance(linear, nn.Linear | nn.QuantizedLinear):
            continue
        if not model.architecture.is_projector(name, held):
            continue
        if isinstance(linear, nn.QuantizedLinear):
            plain = nn.Linear(1, 1, bias="bias" in linear)
            plain.weight = dequantized_weight(linear)
            if "bias" in linear:
                plain.bias = linear.bias
            model.update_modules(tree_unflatten([(path, plain)]))
            linear = plain
        linear.update(tree_map(lambda array: array.astype(mx.float32), linear.parameters()))
        linear.unfreeze()
        mx.eval(linear.parameters())


def adapter_of(
    model: CausalLM,
    settings: TrainSettings,
    base: Base | None = None,
    held: Collection[str] = (),
) -> Adapter:
    """Return what has been trained in a model that `attach` prepared, ready to be written.

    Args:
        held: as for `attach`.
    """
    about: dict[str, Any] = {"base": base, "blocks": len(model.layers)}
    trained = dict(tree_flatten(model.trainable_parameters()))
    if settings.trains_whole_layers:
        return Adapter(weights=trained, **about)
    layers = {
        path.removesuffix(".base_layer"): LoRA(
            module.lora_a, module.lora_b, module.scale, module.get("m")
        )
        for path, module in _adapted_layers(model)
    }
    weights = {
        name: array
        for name, array in trained.items()
        if name.rpartition(".")[2] not in ("lora_a", "lora_b", "m")
    }
    own = {}
    for name in weights:
        if match := COPY.fullmatch(name):
            module = module_at(model, match["path"])
            assert isinstance(module, LoRALinear)
            scale = module.scale_of(match["own"])
            assert scale is not None
            own[match["own"]] = (module.lora_A[match["own"]].weight.shape[0], scale)
    modalities: tuple[str, ...] = ()
    if layers and model.architecture.adapters:
        modalities = tuple(each for each in MODALITIES if each in held)
    return Adapter(
        layers, weights, dropout=settings.dropout, own=own, modalities=modalities, **about
    )


def counts(model: nn.Module) -> Counts:
    """Count the numbers that a model has, and those of them that are not frozen."""
    trained = dict(tree_flatten(model.trainable_parameters()))
    total = sum(_size(module) for module in model.modules())
    return Counts(sum(array.size for array in trained.values()), total)


def _size(module: nn.Module) -> int:
    """Count the numbers that a module itself has."""
    if is_quantized(module):
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


def _adapted(
    linear: nn.Module, settings: TrainSettings, key: mx.array, share: Share | None = None
) -> nn.Module:
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    width, height = input_dims(linear), linear.weight.shape[0]
    columns = share if share is not None and not share.by_rows else None
    if columns is not None:
        width *= columns.group.size()
    bound = 1 / math.sqrt(width)
    lora_a = mx.random.uniform(-bound, bound, (width, settings.rank), key=key)
    if share is not None:
        adapted: nn.Module = ShardedLoRA(linear, share, lora_a, settings.scale, _is_dora(settings))
    else:
        kind = DoRALinear if _is_dora(settings) else LoRALinear
        # Not its from_base, which takes the width of weights at 3, 5 or 6 bits for another.
        adapted = kind(width, height, settings.rank, scale=settings.scale)
        if _is_dora(settings):
            adapted.set_linear(linear)
        else:
            adapted.linear = linear
        adapted.lora_a = lora_a
    adapted.dropout = Dropout(settings.dropout, columns) if settings.dropout else nn.Identity()
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
