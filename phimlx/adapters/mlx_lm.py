"""Adapter folders in mlx-lm's format, which is ours too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import phimlx
from phimlx.adapters.adapter import COPY, KINDS, LAYER, Adapter, Base
from phimlx.adapters.files import (
    CONFIG,
    PARTS,
    check_ranks,
    load_arrays,
    number,
    read_floats,
    write_files,
)
from phimlx.checkpoint.head import EMBEDDING
from phimlx.errors import CheckpointError, ConfigError, shortened, some
from phimlx.models.lora import EmbeddingLoRA, LoRA

WEIGHTS = "adapters.safetensors"
MODALITIES = ("text", "audio", "image")


def read_mlx_lm(config: Mapping[str, Any], file: Path) -> Adapter:
    """Read the adapter of a folder: its `adapter_config.json`, and its weights.

    The tensors' names tell the layers, whatever `num_layers` and `keys` say.

    Raises:
        ConfigError, CheckpointError: naming what is missing, unknown or damaged.
    """
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
    own = _own(config)
    about |= {"own": own, "modalities": _modalities(config)}
    beside = _beside(config) or bool(own)
    if own and "lora_parameters" not in config:
        return _checked_copies(Adapter(weights=load_arrays(file), **about))
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
    whole = {name for name in tensors if beside and name.rpartition(".")[2] not in PARTS}
    tensors = {name: info for name, info in tensors.items() if name not in whole}
    unknown = [name for name in tensors if name.rpartition(".")[2] not in parts]
    if unknown:
        raise CheckpointError(
            f"{file.name} holds {some(unknown)}, which is no part of a {kind} adapter."
        )
    check_ranks(
        {name: info.shape for name, info in tensors.items()}, lambda path: rank, kind == "dora"
    )
    if f"{EMBEDDING}.m" in tensors:
        raise CheckpointError(
            f"{file.name} holds a DoRA of {EMBEDDING}, which phimlx reads from PEFT alone.",
            hint="Train it as LoRA, or fuse it with mlx-lm.",
        )
    arrays = load_arrays(file)
    layers = {
        path.removesuffix(".base_layer"): (EmbeddingLoRA if path == EMBEDDING else LoRA)(
            arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"], scale, arrays.get(f"{path}.m")
        )
        for path in dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    }
    weights = {name: arrays[name] for name in whole}
    return _checked_copies(Adapter(layers, weights, dropout=float(dropout), **about))


def _own(config: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """Read of which of the checkpoint's own adapters there is a copy, with rank and scale."""
    table = config.get("own_adapters") or {}
    if not isinstance(table, Mapping) or not all(
        isinstance(each, Mapping) and str(name).isidentifier() for name, each in table.items()
    ):
        raise ConfigError(f"{CONFIG}: own_adapters is {shortened(table)}, not a table of adapters.")
    return {
        name: (
            number(f"own_adapters.{name}.rank", each.get("rank"), int),
            number(f"own_adapters.{name}.scale", each.get("scale")),
        )
        for name, each in table.items()
    }


def _modalities(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Read what the rows hold that an adapter is for; nothing for all rows."""
    listed = config.get("modalities") or []
    if not isinstance(listed, list) or any(each not in MODALITIES for each in listed):
        raise ConfigError(
            f"{CONFIG}: modalities is {shortened(listed)}, not a list of {', '.join(MODALITIES)}."
        )
    return tuple(listed)


def _beside(config: Mapping[str, Any]) -> bool:
    """Read whether whole tensors stand beside the layers."""
    return config.get("whole_weights") is True


def _checked_copies(adapter: Adapter) -> Adapter:
    """See that the copies of the checkpoint's adapters are whole, and of the rank that is told."""
    shapes = {
        f"{match['path']}.{match['own']}.lora_{match['part'].lower()}": array.shape[::-1]
        for name, array in adapter.weights.items()
        if (match := COPY.fullmatch(name)) and match["own"] in adapter.own
    }
    check_ranks(shapes, lambda path: adapter.own[path.rpartition(".")[2]][0], dora=False)
    return adapter


def write_adapter(folder: str | Path, adapter: Adapter) -> None:
    """Write a folder that mlx-lm loads too; files that are there are replaced, each as a whole.

    Raises:
        CheckpointError: where it cannot be written, or changes what mlx-lm's adapters do not.
    """
    foreign = _foreign(adapter)
    if foreign is not None:
        raise CheckpointError(
            f"The adapter has {foreign}, which mlx-lm's format does not hold.",
            hint="Fuse it: phimlx fuse --model MODEL --adapter-path ADAPTER --save-path OUT",
        )
    adapter = adapter.uniform() if adapter.layers else adapter
    write_files(Path(folder), WEIGHTS, adapter.arrays, adapter_config(adapter))


def _foreign(adapter: Adapter) -> str | None:
    """Name what mlx-lm's format has no place for; None where there is nothing."""
    if adapter.rows:
        return "rows of tokens"
    if adapter.own or adapter.modalities:
        return None  # ours alone, which mlx-lm's own models do not have
    if adapter.layers and adapter.weights:
        return "whole weights beside its layers"
    if any(layer.bias is not None for layer in adapter.layers.values()):
        return "biases of B"
    if EMBEDDING in adapter.layers and not adapter.tied:
        return "a LoRA of the embedding that leaves a tied output head as it is"
    if adapter.start is not None:
        return f"a LoRA over what {adapter.start} left of the base weights"
    return None


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
    if adapter.own:
        config["own_adapters"] = {
            name: {"rank": rank, "scale": scale} for name, (rank, scale) in adapter.own.items()
        }
    if adapter.modalities:
        config["modalities"] = list(adapter.modalities)
    if adapter.layers and adapter.weights:
        config["whole_weights"] = True
    if adapter.base is not None:
        config["base_model"] = {"name": adapter.base.name, "revision": adapter.base.revision}
    config["num_hidden_layers"] = adapter.blocks
    config["phimlx"] = phimlx.__version__
    return config


def _base(config: Mapping[str, Any]) -> Base | None:
    """Read what a config of ours or of mlx-lm's says of the model."""
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
    first, blocks = min(numbers, default=0), adapter.blocks
    last = blocks is not None and numbers == list(range(first, blocks))
    if last and len(names) * len(numbers) == len(adapter.layers):
        return names
    return list(adapter.layers)
