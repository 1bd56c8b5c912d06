"""LoRA and DoRA adapters in the format of PEFT, the library for transformers.

Settings that change more than some linear layers are refused.
Source: peft `tuners/lora/config.py`, `tuners/lora/layer.py`, `utils/save_and_load.py`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from phimlx.adapters.adapter import LAYER, Adapter, Base
from phimlx.adapters.files import (
    CONFIG,
    check_ranks,
    load_arrays,
    number,
    read_floats,
    write_files,
)
from phimlx.errors import CheckpointError, ConfigError, shortened, some
from phimlx.models.lora import LoRA

PEFT_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
"""PEFT's name of a layer's tensor, after its path: mlx-lm's, whose matrices are transposed."""

NAME = re.compile(rf"{re.escape(PREFIX)}(.+?)\.({'|'.join(map(re.escape, PARTS))})")

# Settings that make of an adapter something else, with the values that do not. PEFT writes nearly
# all of them into every config.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "layer_replication": (),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "alora_invocation_tokens": ([],),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    **dict.fromkeys(
        ("arrow_config", "kasa_config", "loftq_config", "monteclora_config", "velora_config"), ({},)
    ),
}

# Ways to start that also change the weights of the base.
CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_peft(config: Mapping[str, Any], file: Path) -> Adapter:
    """The adapter of a folder: its `adapter_config.json`, and `adapter_model.safetensors`.

    The tensors' names tell which layers are adapted, whatever `target_modules` and
    `layers_to_transform` say.

    Raises:
        ConfigError, CheckpointError: naming what is missing, unknown or damaged.
    """
    for key, harmless in HARMLESS.items():
        if config.get(key) not in (None, *harmless):
            raise ConfigError(
                f"{CONFIG}: {key} is {shortened(config[key])}; phimlx reads LoRA and DoRA of "
                "linear layers alone."
            )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGING_STARTS):
        raise ConfigError(
            f"{CONFIG}: init_lora_weights is {shortened(start)}, which changes the model's own "
            "weights too.",
            hint="Save it in PEFT with path_initial_model_for_weight_conversion, which makes it a "
            "plain LoRA.",
        )
    tensors = read_floats(file)
    names = {name: _own_name(name, file) for name in tensors}
    shapes = {
        names[name]: info.shape if names[name].endswith(".m") else info.shape[::-1]
        for name, info in tensors.items()
    }
    if len(shapes) < len(tensors):
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        raise CheckpointError(f"{file.name} holds {some(twice)} twice.")
    ranks, alphas = _Values(config, "r", "rank_pattern"), _Values(config, "lora_alpha")
    rooted = config.get("use_rslora") is True
    dora = config.get("use_dora") is True
    if dora != any(name.endswith(".m") for name in shapes):
        has = "has no" if dora else "has"
        raise CheckpointError(f"use_dora is {dora}, but {file.name} {has} magnitudes.")
    check_ranks(shapes, lambda path: int(ranks.of(path)), dora)
    arrays = load_arrays(file)
    own = {
        names[name]: array if names[name].endswith(".m") else array.T
        for name, array in arrays.items()
    }
    layers = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in own):
        rank = int(ranks.of(path))
        layers[path] = LoRA(
            own[f"{path}.lora_a"],
            own[f"{path}.lora_b"],
            alphas.of(path) / (math.sqrt(rank) if rooted else rank),
            own.get(f"{path}.m"),
        )
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    return Adapter(
        layers,
        base=Base(name, revision if isinstance(revision, str) else None)
        if isinstance(name, str)
        else None,
    )


def write_peft(folder: str | Path, adapter: Adapter) -> None:
    """Write a folder that PEFT loads; files that are there are replaced, each as a whole.

    Raises:
        CheckpointError: for a full fine-tuning, or where it cannot be written.
    """
    if not adapter.layers:
        raise CheckpointError(
            "A full fine-tuning is no adapter that PEFT knows.",
            hint="Fuse it, and export the model: phimlx convert FUSED --mlx-path OUT --export hf",
        )
    ranks = {path: layer.rank for path, layer in adapter.layers.items()}
    alphas = {path: layer.scale * layer.rank for path, layer in adapter.layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    base = adapter.base
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
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
        **_targets(adapter),
    }
    theirs = {own: name for name, own in reversed(PARTS.items())}
    arrays = {}
    for name, array in adapter.arrays.items():
        path, _, part = name.rpartition(".")
        arrays[f"{PREFIX}{path}.{theirs[part]}"] = array if part == "m" else mx.contiguous(array.T)
    write_files(Path(folder), PEFT_WEIGHTS, arrays, config)


class _Values:
    """A setting that a pattern may change for some layers: ranks, alphas."""

    def __init__(self, config: Mapping[str, Any], key: str, patterns: str = "") -> None:
        self._kind = int if key == "r" else float
        self._usual = number(key, config.get(key), self._kind)
        place = patterns or "alpha_pattern"
        table = config.get(place) or {}
        if not isinstance(table, Mapping):
            raise ConfigError(f"{CONFIG}: {place} is {shortened(table)}, not a table of values.")
        self._patterns = {
            _literal(place, pattern): number(f"{place}.{shortened(pattern)}", value, self._kind)
            for pattern, value in table.items()
        }

    def of(self, path: str) -> float:
        """A layer's value: that of the first pattern that its path ends with."""
        for (pattern, anchored), value in self._patterns.items():
            if path == pattern or (not anchored and path.endswith(f".{pattern}")):
                return value
        return self._usual


def _literal(place: str, pattern: str) -> tuple[str, bool]:
    """A pattern as the end of a path, and whether it is the whole.

    PEFT takes regular expressions; those that are read are paths, as PEFT's own tools write them.
    """
    text = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.-]+", text):
        raise ConfigError(
            f"{CONFIG}: {place} has the pattern {shortened(pattern)}; phimlx reads names of "
            "layers, no other regular expressions."
        )
    return text, pattern.startswith("^")


def _own_name(name: str, file: Path) -> str:
    """mlx-lm's name of a tensor."""
    found = NAME.fullmatch(name)
    if found is None:
        raise CheckpointError(
            f"{file.name} holds {some([name])}, which is no part of a LoRA or DoRA adapter."
        )
    return f"{found[1]}.{PARTS[found[2]]}"


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
