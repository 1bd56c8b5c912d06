"""Layers with low-rank adapters beside them, chosen row by row in every call.

The layer below may be quantized: nothing is ever merged into it.
Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353, equation 5; of an embedding: peft,
`tuners/lora/layer.py` and `tuners/lora/dora.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

MAX_RANK = 1 << 14  # a hostile config must not make us build more
DEFAULT = "default"  # the adapter that a model was loaded with, by peft's name for it


@dataclass(frozen=True)
class LoRA:
    """One layer's adapter: scale · B A beside its weight, and for DoRA the length of each row.

    Attributes:
        lora_a: A transposed, `[input, rank]`.
        lora_b: B transposed, `[rank, output]`.
        magnitude: `[output]`; None for LoRA.
        bias: `[output]`, added to what B gives; None for none.
    """

    lora_a: mx.array
    lora_b: mx.array
    scale: float
    magnitude: mx.array | None = None
    bias: mx.array | None = None

    @property
    def rank(self) -> int:
        return self.lora_a.shape[1]

    def delta(self, first: int = 0, last: int | None = None) -> mx.array:
        """Multiply scale · B A in float32, `[output, input]`: rows `first` up to `last`."""
        b, a = self.lora_b[:, first:last], self.lora_a
        return (self.scale * b.astype(mx.float32).T) @ a.astype(mx.float32).T

    def merged(self, weight: mx.array, first: int = 0) -> mx.array:
        """Merge the adapter into rows of a layer's weight, from number `first` on; float32."""
        last = first + weight.shape[0]
        merged = weight.astype(mx.float32) + self.delta(first, last)
        if self.magnitude is None:
            return merged
        gain = self.magnitude[first:last] / mx.linalg.norm(merged, axis=1)
        return gain[:, None] * merged


@dataclass(frozen=True)
class EmbeddingLoRA(LoRA):
    """An embedding's adapter: that of a linear layer over tokens, one for each number that goes in.

    Attributes:
        lora_a: `[vocab, rank]`.
        lora_b: `[rank, hidden]`.
        magnitude: `[hidden]`: the length of each column.
        gain: `[hidden]`: magnitude over length, which the whole weight tells; see `settled`.
    """

    gain: mx.array | None = None

    def settled(self, weight: mx.array) -> EmbeddingLoRA:
        """Compute the gain from the embedding's whole weight, `[vocab, hidden]`."""
        if self.magnitude is None:
            return self
        gain = self.magnitude / mx.linalg.norm(weight.astype(mx.float32) + self.delta(), axis=0)
        return replace(self, gain=gain)

    def delta(self, first: int = 0, last: int | None = None) -> mx.array:
        """Multiply scale · A B in float32, `[vocab, hidden]`: tokens `first` up to `last`."""
        a, b = self.lora_a[first:last], self.lora_b
        return (self.scale * a.astype(mx.float32)) @ b.astype(mx.float32)

    def merged(self, weight: mx.array, first: int = 0) -> mx.array:
        merged = weight.astype(mx.float32) + self.delta(first, first + weight.shape[0])
        return merged if self.gain is None else merged * self.gain


class Routing:
    """Adapters of the rows of one forward pass.

    Args:
        kinds: for each row of the batch the name of its adapter, or None; for every kind of adapter
            of which a row may have one, in the order in which they are applied.
    """

    def __init__(self, *kinds: Sequence[str | None]) -> None:
        self.groups = tuple(_Groups.of(rows) for rows in kinds if any(rows))


@dataclass
class LoadedRoutes:
    """Which rows of a model whose checkpoint holds adapters the loaded ones are for, by name.

    Attributes:
        modalities: "text", "audio" or "image", the kinds of rows that use an adapter; all rows use
            one that is not named here.
        copies: the checkpoint's own adapters of which an adapter brings a copy, trained further;
            its rows use that in place of the original.
    """

    modalities: dict[str, frozenset[str]] = field(default_factory=dict)
    copies: dict[str, frozenset[str]] = field(default_factory=dict)

    def of_row(
        self, loaded: str | None, own: str | None, modality: str
    ) -> tuple[str | None, str | None]:
        """Find what a row uses beside its own adapter and in the place of it.

        Args:
            loaded: name of the loaded adapter that the row asks for.
            own: the checkpoint's adapter that its inputs call for.
            modality: what the row holds.
        """
        if loaded is None:
            return None, own
        if own is not None and own in self.copies.get(loaded, ()):
            own = copy_name(loaded, own)
        return (loaded if modality in self.modalities.get(loaded, (modality,)) else None), own

    def forget(self, name: str) -> None:
        """Let go of what is known of an adapter."""
        self.modalities.pop(name, None)
        self.copies.pop(name, None)


def copy_name(loaded: str, own: str) -> str:
    """Name a loaded adapter's copy of one of the checkpoint's own."""
    return f"{loaded}:{own}"


@dataclass(frozen=True)
class _Groups:
    """Rows that have an adapter of one kind, those of one together.

    Attributes:
        rows: their numbers; None where all rows have the same one.
        spans: of each adapter, where its rows begin and end among them.
    """

    rows: mx.array | None
    spans: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, names: Sequence[str | None]) -> _Groups:
        found: list[int] = []
        spans = []
        for name in dict.fromkeys(name for name in names if name is not None):
            begin = len(found)
            found += [row for row, each in enumerate(names) if each == name]
            spans.append((name, begin, len(found)))
        alike = len(spans) == 1 and len(found) == len(names)
        return cls(None if alike else mx.array(found), tuple(spans))


class LoRALinear(nn.Module):
    """A linear layer with named adapters as side paths; parameters carry peft's names.

    Args:
        base_layer: plain or quantized.
        always: the adapter that every row uses, where no call tells rows apart; None for none.
    """

    def __init__(self, base_layer: nn.Module, always: str | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A: dict[str, nn.Module] = {}
        self.lora_B: dict[str, nn.Module] = {}
        self._scales: dict[str, float] = {}
        self._gains: dict[str, mx.array] = {}  # of DoRA: magnitude / row lengths, `[output]`
        self._always = always

    @classmethod
    def empty(
        cls, input_dims: int, output_dims: int, adapters: Mapping[str, tuple[int, float]]
    ) -> LoRALinear:
        """Make a layer whose weights are to be loaded, with adapters of a rank and a scale each."""
        layer = cls(nn.Linear(input_dims, output_dims, bias=False))
        for name, (rank, scale) in adapters.items():
            layer.lora_A[name] = nn.Linear(input_dims, rank, bias=False)
            layer.lora_B[name] = nn.Linear(rank, output_dims, bias=False)
            layer._scales[name] = scale
        return layer

    @classmethod
    def adapted(
        cls, base_layer: nn.Module, lora: LoRA, name: str = DEFAULT, always: bool = False
    ) -> LoRALinear:
        """Put an adapter beside a layer; others that it has stay. `settle` computes it.

        Args:
            always: whether every row uses it, as of an output head, which knows no rows.
        """
        layer = base_layer if isinstance(base_layer, cls) else cls(base_layer)
        layer._always = name if always else None
        for part, matrix in ((layer.lora_A, lora.lora_a), (layer.lora_B, lora.lora_b)):
            part[name] = nn.Linear(1, 1, bias=False)
            part[name].weight = mx.contiguous(matrix.T)
        if lora.bias is not None:
            layer.lora_B[name].bias = lora.bias * lora.scale
        layer._scales[name] = lora.scale
        if lora.magnitude is not None:
            merged = dequantized_weight(layer.base_layer) + lora.delta()
            layer._gains[name] = lora.magnitude / mx.linalg.norm(merged, axis=1)
        return layer

    def settle(self) -> None:
        """Compute what is here, before the next layer does: for DoRA a whole weight is unpacked."""
        mx.eval(self.parameters(), self._gains)

    def scale_of(self, name: str) -> float | None:
        """Tell the scale of an adapter; None where it is not here."""
        return self._scales.get(name)

    def alias(self, name: str, other: str) -> None:
        """Let an adapter be there under another name too, where it is here."""
        if name in self._scales:
            self.lora_A[other], self.lora_B[other] = self.lora_A[name], self.lora_B[name]
            self._scales[other] = self._scales[name]

    def without(self, name: str) -> nn.Module:
        """Take an adapter and its copies away, if it is here; the plain layer where no other is
        left."""
        for each in self._names(name):
            for part in self._parts:
                part.pop(each, None)
        return self if self._scales else self.base_layer

    def take(self, other: LoRALinear, name: str) -> bool:
        """Take over an adapter and its copies from a layer of the same shape, if it is there."""
        names = other._names(name)
        for each in names:
            own = other.lora_A[each]
            twin = next((one for one in self._scales if other.lora_A.get(one) is own), None)
            if twin is not None:
                self.alias(twin, each)
                continue
            for mine, theirs in zip(self._parts, other._parts, strict=True):
                if each in theirs:
                    mine[each] = theirs[each]
        return bool(names)

    def divide(
        self,
        part: Callable[[nn.Module], nn.Module],
        rows: Callable[[mx.array], mx.array] | None,
    ) -> None:
        """Keep some of the rows, or of the columns.

        Args:
            part: makes the part of a linear layer with as many rows, or columns, as this one.
            rows: takes the part of an array that has a number for each row; None for columns.
        """
        self.base_layer = part(self.base_layer)
        matrices = self.lora_A if rows is None else self.lora_B
        made = {id(whole): part(whole) for whole in matrices.values()}
        matrices.update({name: made[id(whole)] for name, whole in matrices.items()})
        if rows is not None:
            self._gains = {name: rows(gain) for name, gain in self._gains.items()}

    @property
    def _parts(self) -> tuple[dict[str, Any], ...]:
        return self.lora_A, self.lora_B, self._scales, self._gains

    def _names(self, loaded: str) -> list[str]:
        """Names of what is here of a loaded adapter: its own, and those of its copies."""
        return [name for name in self._scales if name.partition(":")[0] == loaded]

    def __call__(self, x: mx.array, routing: Routing | None = None) -> mx.array:
        """`[batch, length, input]` to `[batch, length, output]`."""
        y = self.base_layer(x)
        if self._always is not None:
            y = self._with(self._always, x, y)
        for groups in () if routing is None else routing.groups:
            if not any(name in self._scales for name, _, _ in groups.spans):
                continue
            if groups.rows is None:
                y = self._with(groups.spans[0][0], x, y)
                continue
            inputs, outputs = x[groups.rows], y[groups.rows]
            y[groups.rows] = mx.concatenate(
                [self._with(name, inputs[a:b], outputs[a:b]) for name, a, b in groups.spans]
            )
        return y

    def _with(self, name: str, x: mx.array, y: mx.array) -> mx.array:
        if name not in self._scales:
            return y
        inner = self.lora_A[name](x) * self._scales[name]  # [rows, length, rank]
        y = y + self.lora_B[name](inner).astype(y.dtype)
        gain = self._gains.get(name)
        if gain is None:
            return y
        gain = gain.astype(y.dtype)
        if "bias" not in self.base_layer:
            return y * gain
        bias = self.base_layer.bias  # which DoRA leaves as it is
        return (y - bias) * gain + bias


class LoRAEmbedding(nn.Module):
    """An embedding with an adapter as side path, which every row uses."""

    def __init__(self, base_layer: nn.Module, lora: EmbeddingLoRA) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_embedding_A = lora.lora_a
        self.lora_embedding_B = lora.lora_b * lora.scale
        self._gain = lora.gain

    def __call__(self, ids: mx.array) -> mx.array:
        """`[batch, length]` tokens to `[batch, length, hidden]`."""
        y = self.base_layer(ids)
        y = y + (self.lora_embedding_A[ids] @ self.lora_embedding_B).astype(y.dtype)
        return y if self._gain is None else y * self._gain.astype(y.dtype)


def project(layer: nn.Module, x: mx.array, routing: Routing | None) -> mx.array:
    """Call a projection; only one with adapters is ever given a routing."""
    return layer(x, routing) if routing is not None and isinstance(layer, LoRALinear) else layer(x)


def dequantized_weight(linear: nn.Module) -> mx.array:
    """Read a layer's weight in float32, `[output, input]`, however it is stored.

    Of an embedding: `[vocab, hidden]`.
    """
    if not is_quantized(linear):
        return linear.weight.astype(mx.float32)
    weight = mx.dequantize(
        linear.weight,
        linear.scales,
        linear.get("biases"),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    )
    return weight.astype(mx.float32)


def input_dims(linear: nn.Module) -> int:
    """Tell the width that a linear layer takes, however its weight is stored."""
    width = linear.weight.shape[-1]
    return width * 32 // linear.bits if is_quantized(linear) else width


def is_quantized(layer: nn.Module) -> bool:
    """Whether a linear layer or an embedding, or a machine's share of one, is quantized."""
    return "scales" in layer
