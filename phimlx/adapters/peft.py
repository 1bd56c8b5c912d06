"""LoRA and DoRA adapters in the format of PEFT, the library for transformers.

Source: peft `tuners/lora/layer.py`, `utils/other.py`, `utils/save_and_load.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from phimlx.adapters.adapter import LAYER, Adapter, Base
from phimlx.adapters.files import check_ranks, load_arrays, read_floats, write_files
from phimlx.adapters.peft_settings import PeftSettings
from phimlx.checkpoint.head import EMBEDDING
from phimlx.errors import CheckpointError, some
from phimlx.files import read_json, translate_write_errors, write_json
from phimlx.models.lora import EmbeddingLoRA, LoRA
from phimlx.models.token_rows import TokenRows

PEFT_WEIGHTS = "adapter_model.safetensors"
OWN_FILE = "own_adapter.json"  # beside a LoRA that is a copy of one of the checkpoint's own
PREFIX = "base_model.model."
PARTS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_B.bias": "bias of B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
    "token_adapter.trainable_tokens_delta": "rows",
    "weight": "weight",
    "bias": "bias",
}
"""PEFT's name of a tensor, after the path of the layer that it belongs to: what it is, where mlx-lm
has it by mlx-lm's name, whose matrices are transposed."""

LOW_RANK = ("lora_a", "lora_b", "m")
OWN = ("weight", "bias")
NAME = re.compile(
    rf"{re.escape(PREFIX)}(.+?)(?:\.base_layer|\.modules_to_save)?\."
    rf"({'|'.join(map(re.escape, PARTS))})"
)

Tensor = TypeVar("Tensor")


def read_peft(config: Mapping[str, Any], file: Path) -> Adapter:
    """The adapter of a folder: its `adapter_config.json`, and `adapter_model.safetensors`.

    The tensors' names tell what is changed, whatever `target_modules`, `exclude_modules` and
    `layers_to_transform` say.

    Raises:
        ConfigError, CheckpointError: naming what is missing, unknown or damaged.
    """
    settings = PeftSettings.of(config)
    stored = _by_part(read_floats(file), file)
    for part, flag, what in (
        ("m", "use_dora", "magnitudes"),
        ("bias of B", "lora_bias", "biases of B"),
    ):
        if bool(stored[part]) != settings.flags[flag]:
            has = "has" if stored[part] else "has no"
            raise CheckpointError(
                f"{flag} is {settings.flags[flag]}, but {file.name} {has} {what}."
            )
    shapes = {
        f"{path}.{part}": info.shape if part == "m" else info.shape[::-1]
        for part in LOW_RANK
        for path, info in stored[part].items()
    }
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in shapes))
    settings.check_named([path for part in OWN for path in stored[part]], stored["rows"])
    settings.ranks.read(paths)
    settings.alphas.read(paths)
    check_ranks(shapes, lambda path: int(settings.ranks.of(path)), settings.flags["use_dora"])
    arrays = _by_part(load_arrays(file), file)
    layers = {}
    for path in paths:
        kind = EmbeddingLoRA if path == EMBEDDING else LoRA
        a, b = arrays["lora_a"][path].T, arrays["lora_b"][path].T
        layers[path] = kind(
            a, b, settings.scale(path), arrays["m"].get(path), arrays["bias of B"].get(path)
        )
    weights = {f"{path}.{part}": array for part in OWN for path, array in arrays[part].items()}
    rows = {
        path: TokenRows(settings.tokens_of(path, array.shape), array)
        for path, array in arrays["rows"].items()
    }
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    base = None
    if isinstance(name, str):
        base = Base(name, revision if isinstance(revision, str) else None)
    return Adapter(
        layers,
        weights,
        rows,
        base=base,
        copies=frozenset(each for each in weights if settings.is_copy(each.rpartition(".")[0])),
        tied=settings.flags["ensure_weight_tying"],
        start=settings.start,
    )


def write_peft(folder: str | Path, adapter: Adapter) -> None:
    """Write a folder that PEFT loads; files that are there are replaced, each as a whole.

    Raises:
        CheckpointError: for a full fine-tuning, or where it cannot be written.
    """
    if adapter.own:
        write_own(Path(folder), adapter)
        return
    if not adapter.layers:
        raise CheckpointError(
            "A full fine-tuning is no adapter that PEFT knows.",
            hint="Fuse it, and export the model: phimlx convert FUSED --mlx-path OUT --export hf",
        )
    ranks = {path: layer.rank for path, layer in adapter.layers.items()}
    alphas = {path: layer.scale * layer.rank for path, layer in adapter.layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    base = adapter.base
    copies = sorted({name.rpartition(".")[0] for name in adapter.copies})
    shifted = any(name.endswith(".bias") for name in adapter.weights.keys() - adapter.copies)
    rows = {path: list(each.tokens) for path, each in adapter.rows.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else base.name,
        "revision": None if base is None else base.revision,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "rank_pattern": {f"^{path}": own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {f"^{path}": own for path, own in alphas.items() if own != alpha},
        "use_dora": adapter.kind == "dora",
        "use_rslora": False,
        "lora_bias": any(layer.bias is not None for layer in adapter.layers.values()),
        "bias": "all" if shifted else "none",
        "fan_in_fan_out": False,
        "modules_to_save": copies or None,
        "trainable_token_indices": rows.get(EMBEDDING) if len(rows) == 1 else rows or None,
        "ensure_weight_tying": adapter.tied and EMBEDDING in {*adapter.layers, *copies},
        "init_lora_weights": adapter.start or True,
        "inference_mode": True,
        **_targets(adapter),
    }
    if len(rows) == 1 and EMBEDDING not in rows:
        config["trainable_token_indices"] = rows
    write_files(Path(folder), PEFT_WEIGHTS, _named(adapter), config)


def write_own(folder: Path, adapter: Adapter) -> None:
    """Write each copy of a checkpoint's own adapter as a LoRA of its own, and a new one so.

    One goes into the folder itself; several into one each, as the published checkpoint has them.
    """
    about = replace(adapter, weights={}, layers={}, own={}, modalities=())
    shared = adapter.shared_weights
    saved = frozenset(shared)
    parts = {
        own: replace(about, layers=layers, weights=shared, copies=saved)
        for own, layers in adapter.copied.items()
    }
    if adapter.layers:
        parts[""] = replace(about, layers=adapter.layers, dropout=adapter.dropout)
    for own, part in parts.items():
        place = folder if len(parts) == 1 else folder / f"{own or 'new'}-lora"
        write_peft(place, part)
        if own:
            with translate_write_errors(place, CheckpointError):
                write_json(place / OWN_FILE, {"own_adapter": own})


def as_own(adapter: Adapter, file: Path) -> Adapter:
    """Say of a LoRA that it is a copy of one of the checkpoint's own, as a file beside it tells.

    Raises:
        CheckpointError: where it cannot be one.
    """
    own = read_json(file, CheckpointError).get("own_adapter")
    if not isinstance(own, str) or not own.isidentifier() or adapter.kind != "lora":
        raise CheckpointError(f"{file} does not go with the adapter beside it.")
    adapter = adapter.uniform()
    first = next(iter(adapter.layers.values()))
    weights = dict(adapter.weights)
    for path, layer in adapter.layers.items():
        weights[f"{path}.lora_A.{own}.weight"] = mx.contiguous(layer.lora_a.T)
        weights[f"{path}.lora_B.{own}.weight"] = mx.contiguous(layer.lora_b.T)
    return replace(
        adapter,
        layers={},
        weights=weights,
        copies=frozenset(),
        own={own: (first.rank, first.scale)},
    )


def _by_part(tensors: Mapping[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """Sort a file's tensors: what they are -> path of their layer -> tensor."""
    found: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS.values()}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{file.name} holds {some([name])}, which is no part of a LoRA or DoRA adapter."
            )
        path, part = match[1], PARTS[match[2]]
        if path in found[part]:
            raise CheckpointError(f"{file.name} holds {some([f'{path}.{part}'])} twice.")
        found[part][path] = tensor
    return found


def _named(adapter: Adapter) -> dict[str, mx.array]:
    """All tensors of an adapter under PEFT's names."""
    found = {}
    for path, layer in adapter.layers.items():
        part = "embedding_{}" if isinstance(layer, EmbeddingLoRA) else "{}.weight"
        place = f"{PREFIX}{path}.lora_"
        found[place + part.format("A")] = mx.contiguous(layer.lora_a.T)
        found[place + part.format("B")] = mx.contiguous(layer.lora_b.T)
        if layer.bias is not None:
            found[f"{place}B.bias"] = layer.bias
        if layer.magnitude is not None:
            found[f"{place}magnitude_vector"] = layer.magnitude
    for path, rows in adapter.rows.items():
        found[f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"] = rows.values
    for name, array in adapter.weights.items():
        path, _, part = name.rpartition(".")
        inner = ".base_layer" if path in adapter.layers else ""
        found[f"{PREFIX}{path}{inner}.{part}"] = array
    return found


def _targets(adapter: Adapter) -> dict[str, Any]:
    """`target_modules` and what goes with it: names where all layers are alike, else paths."""
    found = [match.groups() for path in adapter.layers if (match := LAYER.fullmatch(path))]
    blocks = sorted({int(block) for block, _ in found})
    names = list(dict.fromkeys(name for _, name in found))
    if len(blocks) * len(names) != len(adapter.layers):
        return {"target_modules": list(adapter.layers)}
    return {
        "target_modules": [name.rpartition(".")[2] for name in names],
        "layers_to_transform": blocks,
        "layers_pattern": "layers",
    }
