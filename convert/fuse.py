"""An adapter, merged into a model's weights block by block while they are converted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from convert.folder import stamps
from convert.quantize.recipe import Quantization, Recipe, Rule
from convert.quantize.tensor import TensorTransform, TransformedRows
from convert.tensor_plan import TensorConversion, TensorPlan, stored_quantizations
from phimlx.adapters.adapter import Adapter, Change
from phimlx.adapters.fit import check_fit
from phimlx.adapters.mlx_lm import MODALITIES
from phimlx.adapters.read import read_adapter
from phimlx.adapters.resolve import resolved
from phimlx.adapters.split import fused
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.head import EMBEDDING, HEAD
from phimlx.checkpoint.load import build_model, map_model, stored_parameters
from phimlx.errors import CheckpointError
from phimlx.hub.resolve import resolve_adapter
from phimlx.machine.reductions import sum_of_squares


@dataclass
class RoundingLoss:
    """The loss to the type that fused weights are stored in.

    Attributes:
        error: sum of squares of what is stored, less what was computed.
        change: sum of squares of what the adapter changed.
    """

    error: float = 0.0
    change: float = 0.0

    @property
    def share(self) -> float:
        """Size of the error over that of the change; 0 where nothing was fused yet."""
        return math.sqrt(self.error / self.change) if self.change else 0.0


@dataclass(frozen=True)
class AdapterFusion:
    """An adapter that fits a model.

    Attributes:
        folder: that it was read from.
        changes: the same in terms of the model's own parameters.
    """

    folder: Path
    adapter: Adapter
    changes: Adapter = field(repr=False)
    rounding: RoundingLoss = field(default_factory=RoundingLoss)

    @classmethod
    def of(cls, source: str | Path, checkpoint: Checkpoint) -> AdapterFusion:
        """Read an adapter.

        Args:
            source: its folder, or a Hub id.

        Raises:
            ModelNotFoundError: where it is not on this machine.
            ConfigError, CheckpointError: where it cannot be read, was made for another model, or
                cannot be a part of its weights.
        """
        folder = resolve_adapter(source)
        model = map_model(checkpoint)
        adapter = fused(read_adapter(folder), model)
        if set(adapter.modalities) not in (set(), set(MODALITIES)):
            raise CheckpointError(
                f"The adapter is for rows of {' and '.join(adapter.modalities)} alone, and fused "
                "weights are used for all.",
                hint="Use it beside the model (--adapter-path), or train a copy of the model's own "
                "adapter, which can be fused: --train vision-adapter or speech-adapter.",
            )
        check_fit(adapter, model, checkpoint.folder, checkpoint.config)
        vocabulary = adapter.vocabulary
        if vocabulary not in (None, model.config.vocab_size):
            raise CheckpointError(
                f"The adapter gives the model {vocabulary} tokens instead of "
                f"{model.config.vocab_size}, which fusing leaves as they are.",
                hint="Use it beside the model, or merge it in PEFT and convert what this makes.",
            )
        return cls(folder, adapter, resolved(adapter, model))

    @property
    def digest(self) -> str:
        """SHA-256 of its files' names, sizes and times."""
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        return hashlib.sha256(repr(stamps(files)).encode()).hexdigest()

    def applied_to(self, tensors: TensorPlan) -> TensorPlan:
        """Return the same plan with the adapter merged on the way.

        Raises:
            CheckpointError: where it adds to a parameter that the model does not have.
        """
        conversions, layers = tensors.conversions, dict(tensors.layers)
        if self.changes.own_head:
            conversions = (*conversions, *filter(None, map(_as_head, conversions)))
            layers |= {HEAD: layers[EMBEDDING]} if EMBEDDING in layers else {}
        names = {tensor.transform.name for tensor in conversions}
        for path, layer in self.changes.layers.items():
            if layer.bias is not None and f"{path}.bias" not in names:
                raise CheckpointError(
                    f"The adapter adds a bias to {path}, which has none in this model.",
                    hint="Use it beside the model: --adapter-path",
                )
        return replace(tensors, conversions=tuple(map(self._merging, conversions)), layers=layers)

    def config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Say in a model's config what the adapter makes of it."""
        return {**config, "tie_word_embeddings": False} if self.changes.own_head else config

    def markdown(self) -> str:
        """Write a section for the model card."""
        adapter = self.adapter
        what = "A full fine-tuning"
        if adapter.own:
            what = f"The {' and the '.join(sorted(adapter.own))} adapter, trained further"
            what += " with projections" if adapter.shared_weights else ""
        elif adapter.layers:
            name = {"lora": "LoRA", "dora": "DoRA"}[adapter.kind]
            ranks = sorted({layer.rank for layer in adapter.layers.values()})
            what = f"A {name} of rank {', '.join(map(str, ranks))} on {len(adapter.layers)} layers"
            whole, rows = len(adapter.weights), sum(len(r.tokens) for r in adapter.rows.values())
            what += f" with {whole} whole tensors" if whole else ""
            what += f" with rows for {rows} tokens" if rows else ""
        trained = "" if adapter.base is None else f", trained on {adapter.base.name},"
        return f"\n## Fine-tuning\n\n{what}{trained} is fused into the weights.\n"

    def _merging(self, tensor: TensorConversion) -> TensorConversion:
        transform = tensor.transform
        changes = self.changes.changes(transform.name)
        if not changes:
            return tensor
        values = {each.name: getattr(transform, each.name) for each in fields(transform)}
        merge = AdapterMerge(**values, changes=tuple(changes), rounding=self.rounding)
        return replace(tensor, transform=merge)


def _as_head(tensor: TensorConversion) -> TensorConversion | None:
    """Convert the embedding once more as the output head that was tied to it; None for others."""
    path, _, part = tensor.transform.name.rpartition(".")
    if path != EMBEDDING:
        return None
    return replace(tensor, transform=replace(tensor.transform, name=f"{HEAD}.{part}"))


@dataclass(frozen=True)
class AdapterMerge(TensorTransform):
    """A transform that makes an adapter's changes of a parameter, in float32."""

    changes: tuple[Change, ...] = field(repr=False)
    rounding: RoundingLoss = field(repr=False)

    def apply(self, stored: Sequence[mx.array], first: int = 0) -> TransformedRows:
        before = TensorTransform(self.name, self.source, None, mx.float32).apply(stored)
        plain = merged = before.parts[self.name]
        for change in self.changes:
            merged = change.merged(merged, first)
        after = TensorTransform(self.name, None, self.target, self.dtype).apply([merged])
        parts = tuple(after.parts.values())
        kept = parts[0].astype(mx.float32) if self.target is None else self._unpacked(parts)
        return MergedRows(
            self,
            after.parts,
            before.source_finite,
            after.result_finite,
            sum_of_squares(kept - merged),
            sum_of_squares(merged - plain),
        )

    def _unpacked(self, parts: tuple[mx.array, ...]) -> mx.array:
        assert self.target is not None
        packed, scales, *biases = parts
        return mx.dequantize(
            packed, scales, biases[0] if biases else None, dtype=mx.float32, **asdict(self.target)
        )


@dataclass(frozen=True)
class MergedRows(TransformedRows):
    """Rows with an adapter in them, and what rounding did to them."""

    error: mx.array
    moved: mx.array

    def check(self) -> None:
        super().check()
        assert isinstance(self.transform, AdapterMerge)
        self.transform.rounding.error += float(self.error)
        self.transform.rounding.change += float(self.moved)


def stored_recipe(checkpoint: Checkpoint) -> Recipe | None:
    """The recipe that leaves every layer in the form that it has; None where all are plain."""
    table = checkpoint.quantization
    if table is None:
        return None
    model = build_model(checkpoint.config)
    paths = [path for path, module in model.named_modules() if hasattr(module, "to_quantized")]
    stored_parameters(checkpoint, model)
    stored = stored_quantizations(model)
    default = Quantization(table["group_size"], table["bits"], table["mode"])
    others = [path for path in paths if stored.get(path) != default]
    rules = tuple(Rule(path, stored.get(path)) for path in others)
    return Recipe("as stored", default, rules)
