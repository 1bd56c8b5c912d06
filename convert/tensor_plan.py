"""A checkpoint's tensors and what is wanted -> what becomes of each, without reading a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from convert.quantize.recipe import Quantization, Recipe
from convert.quantize.tensor import TensorTransform
from convert.read import RowBlock, in_file_order, stored_bytes
from phimlx.checkpoint.folder import DTYPES, Checkpoint
from phimlx.checkpoint.load import build_model, stored_parameters
from phimlx.checkpoint.tensors import FLOATING_DTYPES, STORED_DTYPES, Tensor
from phimlx.errors import ConversionError
from phimlx.models.registry import part_of

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorConversion:
    """One tensor, or the tensors of one quantized layer, and what becomes of it.

    Attributes:
        shape: of the unquantized weights, however they are stored.
    """

    transform: TensorTransform
    tensors: tuple[Tensor, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return self._rows * self._row_size

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return stored_bytes(self.tensors)

    @property
    def files(self) -> frozenset[Path]:
        return frozenset(
            rows.info.file for tensor in self.tensors for rows in tensor.reads(0, tensor.count)
        )

    def blocks(self, nbytes: int) -> Iterator[RowBlock]:
        """Divide it into rows that together make no more than `nbytes` unquantized, or are one.

        A quarter of that where they are unpacked first, which MLX does in wider numbers.
        """
        nbytes //= 1 if self.transform.source is None else 4
        count = max(1, nbytes // (self._row_size * self.transform.dtype.size))
        for first in range(0, self._rows, count):
            yield RowBlock(self.tensors, first, min(first + count, self._rows))

    def result(self) -> dict[str, mx.array]:
        """Make the tensors of the output: names, shapes and types, never computed."""
        templates = [mx.zeros(tensor.shape, STORED_DTYPES[tensor.dtype]) for tensor in self.tensors]
        return self.transform.apply(templates).parts

    @property
    def _rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def _row_size(self) -> int:
        size = 1
        for dimension in self.shape[1:]:
            size *= dimension
        return size


@dataclass(frozen=True)
class TensorPlan:
    """Every tensor of a conversion, checked and laid out.

    Attributes:
        layers: what becomes of each layer that can be quantized; empty where none is to be.
        undivided: layers that stay as they are because groups do not divide their width.
    """

    conversions: tuple[TensorConversion, ...]
    layers: Mapping[str, Quantization | None]
    undivided: tuple[str, ...]

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        recipe: Recipe | None,
        dtype: str | None,
        whole: bool = False,
    ) -> TensorPlan:
        """Lay out the whole of a checkpoint.

        Args:
            recipe: None leaves every layer unquantized.
            dtype: of what is not quantized; None keeps each tensor's own.
            whole: whether those parts of encoders are kept that no answer depends on.
        """
        model = build_model(checkpoint.config)
        shapes = {
            path: tuple(module.weight.shape)
            for path, module in model.named_modules()
            if hasattr(module, "to_quantized") and not is_lookup_table(path, module)
        }
        tensors = stored_parameters(checkpoint, model)
        if whole and checkpoint.quantization is None:
            tensors |= {
                name: info
                for name, info in checkpoint.tensors.items()
                if part_of(name) and info.dtype in FLOATING_DTYPES
            }
        stored = stored_quantizations(model)
        layers: dict[str, Quantization | None] = {}
        undivided: tuple[str, ...] = ()
        if recipe is not None:
            widths = {path: shape[-1] for path, shape in shapes.items()}
            own = {width for path, width in widths.items() if part_of(path) is None}
            layers, undivided = recipe.assign(widths, model.config.num_hidden_layers)
            if not any(layers.values()):
                raise ConversionError(
                    f"Groups of {recipe.default.group_size} divide the width of no layer of this "
                    f"model ({', '.join(map(str, sorted(own)))}).",
                    hint="Choose a smaller group size.",
                )
        ordered = in_file_order(tensors)
        plain = Counter(STORED_DTYPES[info.dtype] for info in tensors.values())
        usual = max(DTYPES.values(), key=lambda dtype: plain[dtype])  # where scales tell no type
        conversions = []
        for name, tensor in ordered.items():
            if name.rpartition(".")[0] in stored and name.endswith((".scales", ".biases")):
                continue  # comes with its layer's weight
            path = name.removesuffix(".weight")  # a layer's, or a name that is none's: a bias
            source = stored.get(path)
            members = [tensor]
            if source is not None:
                extra = (f"{path}.scales", f"{path}.biases")
                members += [ordered[other] for other in extra if other in ordered]
            kept = STORED_DTYPES[members[-1].dtype]
            if kept not in NAMES:
                kept = usual
            target = layers.get(path)
            if recipe is not None and target is None and source is not None:
                target = layers[path] = source
            transform = TensorTransform(name, source, target, DTYPES[dtype] if dtype else kept)
            conversions.append(
                TensorConversion(transform, tuple(members), shapes.get(path, tensor.shape))
            )
        return cls(tuple(conversions), layers, undivided)

    @property
    def dtype(self) -> str | None:
        """Type of what is not quantized, and of scales; None where there are several."""
        names = {NAMES[tensor.transform.dtype] for tensor in self.conversions}
        return names.pop() if len(names) == 1 else None

    @property
    def file_order(self) -> list[frozenset[Path]]:
        """The files of each tensor, in the order in which they are converted."""
        return [tensor.files for tensor in self.conversions]

    @property
    def bytes_before(self) -> int:
        return sum(tensor.nbytes for tensor in self.conversions)


def is_lookup_table(path: str, module: nn.Module) -> bool:
    """Tell whether a layer of an encoder is looked up, not multiplied: it is never quantized."""
    return isinstance(module, nn.Embedding) and part_of(path) is not None


def stored_quantizations(model: nn.Module) -> dict[str, Quantization]:
    """List the form of every layer that is stored quantized, of a model that has that form."""
    return {
        path: Quantization(module.group_size, module.bits, module.mode)
        for path, module in model.named_modules()
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
    }
