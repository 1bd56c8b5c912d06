"""Adapters: what fine-tuning adds to a model, from and to a folder, and put beside its layers.

Knows mlx-lm's folders, and leaves PEFT's to `phimlx.adapters.peft`; knows nothing of training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

import phimlx
from phimlx import catalog
from phimlx.adapters.files import (
    CONFIG,
    PARTS,
    check_ranks,
    load_arrays,
    number,
    read_floats,
    some,
    write_files,
)
from phimlx.checkpoint.folder import PACKED_DTYPES
from phimlx.errors import CheckpointError, ConfigError, shortened
from phimlx.files import read_json
from phimlx.hub.transfer import record_of
from phimlx.models.base import CausalLM
from phimlx.models.lora import AdaptedLinear, LowRank, input_dims

WEIGHTS = "adapters.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"

KINDS = ("lora", "dora", "full")
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on, as far as anything tells.

    Attributes:
        name: a published name, or a folder's.
        revision: its commit on the Hub, where the name is one of the Hub's.
    """

    name: str
    revision: str | None = None

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any]) -> Base:
        """The model in a folder whose `config.json` is given."""
        known = catalog.by_config(config, folder)
        name = folder.resolve().name if known is None else known.repo or known.alias
        repository, commit = folder.parent.parent.name.removeprefix("models--"), folder.name
        if folder.parent.name != "snapshots":
            kept = read_json(record_of(folder), missing_ok=True)
            repository, commit = str(kept.get("repository")), str(kept.get("commit"))
        # Another repository's commit, a quantized one's say, is none of this one.
        return cls(name, commit if repository.replace("--", "/") == name else None)


@dataclass(frozen=True)
class Adapter:
    """What fine-tuning adds to a model.

    Attributes:
        layers: by path in the model (`model.layers.0.self_attn.qkv_proj`); empty for "full".
        weights: for "full", tensors that take the place of the model's own.
        blocks: how many the model has that it was made for; None where that is not known.
        dropout: that it was trained with.
    """

    layers: Mapping[str, LowRank] = field(default_factory=dict)
    weights: Mapping[str, mx.array] = field(default_factory=dict)
    base: Base | None = None
    blocks: int | None = None
    dropout: float = 0.0

    @property
    def kind(self) -> str:
        """`lora`, `dora` or `full`."""
        if not self.layers:
            return "full"
        return "lora" if next(iter(self.layers.values())).magnitude is None else "dora"

    @property
    def arrays(self) -> dict[str, mx.array]:
        """All tensors, under mlx-lm's names."""
        found = dict(self.weights)
        for path, layer in self.layers.items():
            found[f"{path}.lora_a"], found[f"{path}.lora_b"] = layer.lora_a, layer.lora_b
            if layer.magnitude is not None:
                found[f"{path}.m"] = layer.magnitude
        return found

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return sum(array.size for array in self.arrays.values())

    def uniform(self) -> Adapter:
        """The same adapter with one rank and one scale in all layers, as mlx-lm knows them."""
        rank = max(layer.rank for layer in self.layers.values())
        scale = next(iter(self.layers.values())).scale

        def filled(layer: LowRank) -> LowRank:
            if (layer.rank, layer.scale) == (rank, scale):
                return layer
            room = rank - layer.rank
            return replace(
                layer,
                lora_a=mx.pad(layer.lora_a, [(0, 0), (0, room)]),
                lora_b=mx.pad(layer.lora_b * (layer.scale / scale), [(0, room), (0, 0)]),
                scale=scale,
            )

        return replace(self, layers={path: filled(layer) for path, layer in self.layers.items()})


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter in a folder of mlx-lm's format, ours, or PEFT's.

    Raises:
        ConfigError, CheckpointError: naming what is missing, unknown or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no adapter folder {folder}.", hint="An adapter is a folder on this machine."
        )
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} holds no {CONFIG}, so it is not an adapter folder.")
    config = read_json(folder / CONFIG)
    is_peft = "peft_type" in config
    file = folder / (PEFT_WEIGHTS if is_peft else WEIGHTS)
    if not file.is_file():
        raise CheckpointError(
            f"{folder} holds no {file.name}.",
            hint="Only safetensors weights are read, never .bin, .pt or .npz files.",
        )
    if not is_peft:
        return _read(config, file)
    from phimlx.adapters.peft import read_peft

    return read_peft(config, file)


def write_adapter(folder: str | Path, adapter: Adapter) -> None:
    """Write a folder that mlx-lm loads too; files that are there are replaced, each as a whole.

    Raises:
        CheckpointError: where it cannot be written.
    """
    adapter = adapter.uniform() if adapter.layers else adapter
    write_files(Path(folder), WEIGHTS, adapter.arrays, adapter_config(adapter))


def adapter_config(adapter: Adapter) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter whose layers have one rank and one scale."""
    config: dict[str, Any] = {"fine_tune_type": adapter.kind}
    numbers = sorted({int(found[1]) for name in adapter.arrays if (found := LAYER.match(name))})
    config["num_layers"] = len(numbers)
    if adapter.layers:
        first = next(iter(adapter.layers.values()))
        config["lora_parameters"] = {
            "rank": first.rank,
            "scale": first.scale,
            "dropout": adapter.dropout,
            "keys": _keys(adapter, numbers),
        }
    if adapter.base is not None:
        config["base_model"] = {"name": adapter.base.name, "revision": adapter.base.revision}
    config["num_hidden_layers"] = adapter.blocks
    config["phimlx"] = phimlx.__version__
    return config


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
        adapted = AdaptedLinear(modules[path], layer)
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
        known = catalog.by_config(config, folder or "")
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


def _read(config: Mapping[str, Any], file: Path) -> Adapter:
    """mlx-lm's format. The tensors' names tell the layers, whatever `num_layers` and `keys` say."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise ConfigError(
            f"{CONFIG}: fine_tune_type is {shortened(kind)}, not one of {', '.join(KINDS)}."
        )
    tensors = read_floats(file)
    blocks = config.get("num_hidden_layers")
    about: dict[str, Any] = {
        "base": _base(config),
        "blocks": number("num_hidden_layers", blocks, int) if blocks is not None else None,
    }
    if kind == "full":
        return Adapter(weights=load_arrays(file), **about)
    settings = config.get("lora_parameters")
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"{CONFIG}: lora_parameters is {shortened(settings)}, not a table of values."
        )
    rank = number("lora_parameters.rank", settings.get("rank"), int)
    scale = number("lora_parameters.scale", settings.get("scale"))
    dropout = settings.get("dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ConfigError(
            f"{CONFIG}: lora_parameters.dropout is {shortened(dropout)}, not a number from 0 up to "
            "1."
        )
    parts = PARTS if kind == "dora" else PARTS[:2]
    unknown = [name for name in tensors if name.rpartition(".")[2] not in parts]
    if unknown:
        raise CheckpointError(
            f"{file.name} holds {some(unknown)}, which is no part of a {kind} adapter."
        )
    check_ranks(
        {name: info.shape for name, info in tensors.items()}, lambda path: rank, kind == "dora"
    )
    arrays = load_arrays(file)
    layers = {
        path: LowRank(
            arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"], scale, arrays.get(f"{path}.m")
        )
        for path in dict.fromkeys(name.rpartition(".")[0] for name in arrays)
    }
    return Adapter(layers, dropout=float(dropout), **about)


def _base(config: Mapping[str, Any]) -> Base | None:
    """What a config of ours or of mlx-lm's says of the model."""
    table = config.get("base_model")
    named = table if isinstance(table, Mapping) else {"name": config.get("model")}
    name, revision = named.get("name"), named.get("revision")
    if not isinstance(name, str):
        return None
    return Base(name, revision if isinstance(revision, str) else None)


def _keys(adapter: Adapter, numbers: list[int]) -> list[str]:
    """mlx-lm's `keys`: names within a block where the last blocks are all alike, else whole paths.

    mlx-lm looks for the former in the last `num_layers` blocks, and for the latter everywhere.
    """
    found = [match.groups() for path in adapter.layers if (match := LAYER.match(path))]
    names = list(dict.fromkeys(name for _, name in found))
    last = adapter.blocks is not None and numbers == list(range(numbers[0], adapter.blocks))
    if last and len(names) * len(numbers) == len(adapter.layers):
        return names
    return list(adapter.layers)


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
