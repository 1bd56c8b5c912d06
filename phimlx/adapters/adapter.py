"""An adapter in memory: what fine-tuning adds to a model, whichever files it comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from phimlx import catalog
from phimlx.checkpoint.head import EMBEDDING, HEAD
from phimlx.hub.destination import origin_of
from phimlx.hub.layout import model_name
from phimlx.models.lora import LoRA
from phimlx.models.token_rows import TokenRows

KINDS = ("lora", "dora", "full")
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
COPY = re.compile(r"(?P<path>.+)\.lora_(?P<part>[AB])\.(?P<own>\w+)\.weight")


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


class Change(Protocol):
    """A change of one parameter, made block of rows by block of rows."""

    def merged(self, weight: mx.array, first: int = 0) -> mx.array:
        """Change rows of the unquantized parameter, from number `first` on; float32."""


@dataclass(frozen=True)
class Replacement:
    """Numbers that take a parameter's place."""

    values: mx.array

    def merged(self, weight: mx.array, first: int = 0) -> mx.array:
        return self.values[first : first + weight.shape[0]].astype(mx.float32)


@dataclass(frozen=True)
class BiasShift:
    """Numbers that are added to a bias: scale · the bias of a LoRA's B."""

    values: mx.array

    def merged(self, weight: mx.array, first: int = 0) -> mx.array:
        return weight.astype(mx.float32) + self.values[first : first + weight.shape[0]]


@dataclass(frozen=True)
class Adapter:
    """An adapter: all that fine-tuning changes in a model.

    Each change belongs to a parameter: low rank beside it, some of its rows in place of its own, or
    all of it. What of that reaches an output head that is tied to the embedding, `resolved` says.

    Attributes:
        layers: by path in the model (`model.layers.0.self_attn.qkv_proj`); empty for "full".
        weights: tensors that take the place of the model's own, by name.
        rows: of an embedding or an output head, by its path.
        base: that it was trained on.
        blocks: how many the model has that it was made for; None where that is not known.
        dropout: that it was trained with.
        copies: those of `weights` that are a copy of one layer, whatever its numbers are tied to.
        tied: whether what changes the embedding changes a head that is tied to it.
        own_head: whether a head that was tied is parted from the embedding; `resolved` says so.
        start: the method that took the first A and B out of the base weights; None for none.
        own: rank and scale of the checkpoint's own adapters of which `weights` holds a copy that
            was trained further, under the names that the checkpoint gives them.
        modalities: "text", "audio" and "image", what the rows hold that `layers` are for; empty for
            all rows.
        remarks: what a person should know of how it was read.
    """

    layers: Mapping[str, LoRA] = field(default_factory=dict)
    weights: Mapping[str, mx.array] = field(default_factory=dict)
    rows: Mapping[str, TokenRows] = field(default_factory=dict)
    base: Base | None = None
    blocks: int | None = None
    dropout: float = 0.0
    copies: frozenset[str] = frozenset()
    tied: bool = True
    own_head: bool = False
    start: str | None = None
    own: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    modalities: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """`lora`, `dora` or `full`."""
        if not self.layers:
            return "lora" if self.own else "full"
        return "lora" if next(iter(self.layers.values())).magnitude is None else "dora"

    @property
    def copied(self) -> dict[str, dict[str, LoRA]]:
        """The copies of the checkpoint's own adapters: layers by path, by the adapter's name."""
        found: dict[str, dict[str, LoRA]] = {name: {} for name in self.own}
        for name, array in self.weights.items():
            match = COPY.fullmatch(name)
            if match is not None and match["part"] == "A" and match["own"] in self.own:
                path, own = match["path"], match["own"]
                b = self.weights[f"{path}.lora_B.{own}.weight"]
                found[own][path] = LoRA(array.T, b.T, self.own[own][1])
        return found

    @property
    def shared_weights(self) -> dict[str, mx.array]:
        """Those of `weights` that are no copy of an adapter: all rows use them."""
        return {
            name: array
            for name, array in self.weights.items()
            if (match := COPY.fullmatch(name)) is None or match["own"] not in self.own
        }

    @property
    def vocabulary(self) -> int | None:
        """Tell how many tokens the model has with the adapter's own embedding; None without."""
        for name in (f"{EMBEDDING}.weight", f"{HEAD}.weight"):
            if name in self.weights:
                return self.weights[name].shape[0]
        return None

    def changes(self, name: str) -> list[Change]:
        """List what changes a parameter, in order; nothing for most."""
        path, _, part = name.rpartition(".")
        path = path.removesuffix(".base_layer")
        layer = self.layers.get(path)
        found: list[Change] = []
        if name in self.weights:
            found.append(Replacement(self.weights[name]))
        if part == "weight":
            found += [each for each in (layer, self.rows.get(path)) if each is not None]
        elif part == "bias" and layer is not None and layer.bias is not None:
            found.append(BiasShift(layer.bias * layer.scale))
        return found

    @property
    def arrays(self) -> dict[str, mx.array]:
        """All tensors, under mlx-lm's names, or such as it would give."""
        found = dict(self.weights)
        found.update({f"{path}.rows": rows.values for path, rows in self.rows.items()})
        for path, layer in self.layers.items():
            found[f"{path}.lora_a"], found[f"{path}.lora_b"] = layer.lora_a, layer.lora_b
            if layer.magnitude is not None:
                found[f"{path}.m"] = layer.magnitude
            if layer.bias is not None:
                found[f"{path}.bias_b"] = layer.bias
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
