"""An adapter, merged into a model's weights block by block while they are converted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import mlx.core as mx

from convert.folder import stamps
from convert.quantize.recipe import Quantization, Recipe, Rule
from convert.quantize.tensor import TensorTransform, TransformedRows
from convert.tensor_plan import TensorConversion, TensorPlan, stored_quantizations
from phimlx.adapters.adapter import Adapter
from phimlx.adapters.fit import check_fit
from phimlx.adapters.read import read_adapter
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, stored_parameters
from phimlx.machine.reductions import sum_of_squares
from phimlx.models.lora import LoRA


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
    """

    folder: Path
    adapter: Adapter
    rounding: RoundingLoss = field(default_factory=RoundingLoss)

    @classmethod
    def of(cls, folder: str | Path, checkpoint: Checkpoint) -> AdapterFusion:
        """Read an adapter.

        Raises:
            ConfigError, CheckpointError: where it cannot be read, or was made for another model.
        """
        adapter = read_adapter(folder)
        model = build_model(checkpoint.config)
        stored_parameters(checkpoint, model)
        check_fit(adapter, model, checkpoint.folder, checkpoint.config)
        return cls(Path(folder), adapter)

    @property
    def digest(self) -> str:
        """SHA-256 of its files' names, sizes and times."""
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        return hashlib.sha256(repr(stamps(files)).encode()).hexdigest()

    def applied_to(self, tensors: TensorPlan) -> TensorPlan:
        """Return the same plan with the adapter merged on the way."""
        return replace(tensors, conversions=tuple(map(self._merging, tensors.conversions)))

    def markdown(self) -> str:
        """Write a section for the model card."""
        adapter = self.adapter
        what = "A full fine-tuning"
        if adapter.layers:
            name = {"lora": "LoRA", "dora": "DoRA"}[adapter.kind]
            ranks = sorted({layer.rank for layer in adapter.layers.values()})
            what = f"A {name} of rank {', '.join(map(str, ranks))} on {len(adapter.layers)} layers"
        trained = "" if adapter.base is None else f", trained on {adapter.base.name},"
        return f"\n## Fine-tuning\n\n{what}{trained} is fused into the weights.\n"

    def _merging(self, tensor: TensorConversion) -> TensorConversion:
        transform = tensor.transform
        layer = self.adapter.layers.get(transform.name.removesuffix(".weight"))
        values = {each.name: getattr(transform, each.name) for each in fields(transform)}
        if layer is not None:
            merge = AdapterMerge(**values, layer=layer, rounding=self.rounding)
            return replace(tensor, transform=merge)
        weight = self.adapter.weights.get(transform.name)
        if weight is not None:
            return replace(tensor, transform=TensorReplacement(**values, weight=weight))
        return tensor


@dataclass(frozen=True)
class AdapterMerge(TensorTransform):
    """A transform that merges an adapter into a layer, in float32."""

    layer: LoRA = field(repr=False)
    rounding: RoundingLoss = field(repr=False)

    def apply(self, stored: Sequence[mx.array], first: int = 0) -> TransformedRows:
        before = TensorTransform(self.name, self.source, None, mx.float32).apply(stored)
        plain = before.parts[self.name]
        merged = self.layer.merged(plain, first)
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


@dataclass(frozen=True)
class TensorReplacement(TensorTransform):
    """A transform to the tensor that full fine-tuning made of one."""

    weight: mx.array = field(repr=False)

    def apply(self, stored: Sequence[mx.array], first: int = 0) -> TransformedRows:
        count = stored[0].shape[0]
        plain = TensorTransform(self.name, None, self.target, self.dtype)
        return plain.apply([self.weight[first : first + count]])


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
