"""Whether an adapter was made for a model: names, shapes and vocabularies compared before anything
is changed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from phimlx import catalog
from phimlx.adapters.adapter import LAYER, Adapter, Base
from phimlx.adapters.files import CONFIG
from phimlx.adapters.resolve import EMBEDDING_WEIGHT, HEAD_WEIGHT
from phimlx.checkpoint.head import EMBEDDING, HEAD
from phimlx.checkpoint.tensors import PACKED_DTYPES
from phimlx.errors import CheckpointError, shortened, some
from phimlx.hub.layout import model_name
from phimlx.models.base import CausalLM
from phimlx.models.lora import LoRALinear, input_dims


def check_fit(
    adapter: Adapter,
    model: CausalLM,
    folder: Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Raise CheckpointError where an adapter was made for another model than this."""
    known = catalog.by_config(config, model_name(folder) if folder else "") if config else None
    if adapter.base is not None and config is not None:
        trained = catalog.by_config({**config, "_name_or_path": adapter.base.name})
        if known is not None and trained is not None and known != trained:
            raise CheckpointError(
                f"This adapter was trained on {trained.alias}, not on {known.alias}.",
                hint=f"Use it with --model {trained.alias}; to use it here all the same, take the "
                f"model's name out of its {CONFIG}.",
            )
    name = known.alias if known else shortened(folder.resolve().name) if folder else None
    _check_shapes(adapter, model, _Names(adapter.base, name))


@dataclass(frozen=True)
class _Names:
    """The model that an adapter was made for and the one that it is to change, as far as known."""

    base: Base | None
    model: str | None

    def check(self, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        """Raise CheckpointError where a tensor has another shape than the model needs."""
        if shape == wanted:
            return
        made_for = "another model" if self.base is None else shortened(self.base.name)
        made_for += "" if self.base is None or self.model is None else f", not for {self.model}"
        raise CheckpointError(
            f"The adapter was made for {made_for}: {name} has shape {list(shape)}, and this one "
            f"needs {list(wanted)}."
        )


def _check_shapes(adapter: Adapter, model: CausalLM, names: _Names) -> None:
    parameters = dict(tree_flatten(model.parameters()))
    modules = dict(model.named_modules())
    shapes = _shapes(model, modules)
    tied = model.config.tie_word_embeddings
    _all_known(adapter.layers, shapes, "layers")
    _all_known(adapter.rows, {EMBEDDING, HEAD}, "layers with a row for each token")
    _all_known(adapter.weights, {*parameters, HEAD_WEIGHT} if tied else parameters, "weights")
    vocab = _vocabulary(adapter, model)
    for path, layer in adapter.layers.items():
        width, height = shapes[path]
        width, height = (vocab if path == EMBEDDING else width, vocab if path == HEAD else height)
        wanted = {
            "lora_a": (layer.lora_a, (width, layer.rank)),
            "lora_b": (layer.lora_b, (layer.rank, height)),
            "m": (layer.magnitude, (height,)),
            "bias": (layer.bias, (height,)),
        }
        for part, (array, shape) in wanted.items():
            if array is not None:
                names.check(f"{path}.{part}", array.shape, shape)
    for path, rows in adapter.rows.items():
        names.check(
            f"{path}'s rows", rows.values.shape, (len(rows.tokens), model.config.hidden_size)
        )
        if max(rows.tokens) >= vocab:
            raise CheckpointError(
                f"The adapter has a row for token {max(rows.tokens)} of {path}, and this model "
                f"has {vocab} tokens."
            )
        if path in adapter.layers or f"{path}.bias" in parameters:
            raise CheckpointError(
                f"The adapter has rows for tokens of {path}, which go neither beside a LoRA nor "
                "with a bias.",
                hint="Merge it in PEFT, and convert the model that this makes.",
            )
    _check_own(adapter, modules, names)
    for name, array in adapter.weights.items():
        path = name.rpartition(".")[0]
        module = modules.get(path)
        quantized = isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
        if quantized and adapter.kind == "full":
            raise CheckpointError(
                f"The adapter replaces {name}, which is quantized here.",
                hint="Full fine-tuning goes with the model that it started from, not quantized.",
            )
        if name in (EMBEDDING_WEIGHT, HEAD_WEIGHT):
            needed: tuple[int, ...] = (vocab, model.config.hidden_size)
        elif quantized and module is not None and name.endswith(".weight"):
            needed = (module.weight.shape[0], input_dims(module))
        elif name in parameters and parameters[name].dtype not in PACKED_DTYPES:
            needed = parameters[name].shape
        else:
            raise CheckpointError(f"The adapter replaces {name}, which is quantized here.")
        names.check(name, array.shape, needed)


def _check_own(adapter: Adapter, modules: Mapping[str, nn.Module], names: _Names) -> None:
    """Raise CheckpointError where the model's own adapters are scaled otherwise than the copies."""
    for own, layers in adapter.copied.items():
        for path, layer in layers.items():
            module = modules.get(path)
            scale = module.scale_of(own) if isinstance(module, LoRALinear) else None
            if scale is not None and scale != layer.scale:
                raise CheckpointError(
                    f"The adapter holds a copy of the model's {own} adapter at the scale "
                    f"{layer.scale:g}, and the model has {scale:g}.",
                    hint="Use it with the model that it was trained on.",
                )


def _vocabulary(adapter: Adapter, model: CausalLM) -> int:
    """Tell how many tokens the model has with the adapter's own embedding and head."""
    has = {
        name: adapter.weights[name].shape[0]
        for name in (EMBEDDING_WEIGHT, HEAD_WEIGHT)
        if name in adapter.weights and adapter.weights[name].ndim
    }
    own = model.config.vocab_size
    sizes = set(has.values())
    whole = len(has) == 2 or (model.config.tie_word_embeddings and not adapter.copies)
    if sizes <= {own}:
        return own
    if len(sizes) == 1 and whole:
        return sizes.pop()
    said = " and ".join(f"{name} has {rows} rows" for name, rows in has.items())
    raise CheckpointError(
        f"The adapter gives the model another vocabulary only in part: {said}, and the model has "
        f"{own} tokens.",
        hint="Save it in PEFT with save_embedding_layers=True.",
    )


def _shapes(model: CausalLM, modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Input and output width of every layer that can be adapted, by path."""
    found = {}
    for number, _ in enumerate(model.layers):
        for name in model.architecture.projections:
            path = f"model.layers.{number}.{name}"
            module = modules.get(path)
            if module is None:
                continue
            linear = module.base_layer if isinstance(module, LoRALinear) else module
            found[path] = (input_dims(linear), linear.weight.shape[0])
    hidden, vocab = model.config.hidden_size, model.config.vocab_size
    return {**found, EMBEDDING: (vocab, hidden), HEAD: (hidden, vocab)}


def _all_known(names: Iterable[str], known: Container[str], what: str) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        targets: set[str] = set()
        if isinstance(known, Mapping):
            targets = {m[2] for name in known if (m := LAYER.match(name))}
        hint = f"Layers that can be adapted: {', '.join(sorted(targets))}." if targets else None
        raise CheckpointError(
            f"The adapter changes {some(unknown)}, which is none of this model's {what} that an "
            "adapter can change.",
            hint=hint if what == "layers" else None,
        )
