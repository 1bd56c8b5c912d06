"""An adapter in memory: what fine-tuning adds to a model, whichever files it comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from phimlx import catalog
from phimlx.hub.destination import origin_of
from phimlx.hub.layout import model_name
from phimlx.models.lora import LoRA

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
        known = catalog.by_config(config, model_name(folder))
        name = folder.resolve().name if known is None else known.repo or known.alias
        repository, commit = origin_of(folder) or (None, None)
        # Another repository's commit, a quantized one's say, is none of this one.
        return cls(name, commit if repository == name else None)


@dataclass(frozen=True)
class Adapter:
    """An adapter: all that fine-tuning adds to a model.

    Attributes:
        layers: by path in the model (`model.layers.0.self_attn.qkv_proj`); empty for "full".
        weights: for "full", tensors that take the place of the model's own.
        blocks: how many the model has that it was made for; None where that is not known.
        dropout: that it was trained with.
    """

    layers: Mapping[str, LoRA] = field(default_factory=dict)
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
        """Count the numbers that it holds."""
        return sum(array.size for array in self.arrays.values())

    def uniform(self) -> Adapter:
        """The same adapter with one rank and one scale in all layers, as mlx-lm knows them."""
        rank = max(layer.rank for layer in self.layers.values())
        scale = next(iter(self.layers.values())).scale

        def filled(layer: LoRA) -> LoRA:
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
