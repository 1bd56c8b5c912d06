"""Which mlp channels and groups of heads stay in each decoder layer.

What a unit adds to the hidden states is its inputs x to the projection that reads them, times the
columns of that projection's weight W. Its importance is the root of the sum of (|W| · ‖x‖)² over
its columns, where ‖x‖ is the root mean square over tokens: the scores of Wanda (arXiv 2306.11695,
equation 1) gathered by column, as FLAP (arXiv 2312.11983) and Minitron (arXiv 2407.14679, section
2.2) leave out whole channels and heads by their activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from convert.prune.layers import Advance
from convert.quantize.layerwise import embed_windows
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import map_model
from phimlx.errors import ConversionError
from phimlx.models.base import CausalLM, ModelConfig
from phimlx.models.lora import dequantized_weight
from phimlx.models.registry import Architecture, Width


@dataclass(frozen=True)
class WidthChoice:
    """Units that stay, as many in each layer.

    Attributes:
        importance: of every unit, for each layer that stays.
        kept: numbers of the units of each of these layers, in order.
    """

    importance: tuple[tuple[float, ...], ...]
    kept: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, importance: Sequence[Sequence[float]], count: int) -> WidthChoice:
        """Keep so many of the most important ones of each layer."""
        orders = [np.argsort(-np.asarray(each), kind="stable")[:count] for each in importance]
        kept = tuple(tuple(np.sort(order).tolist()) for order in orders)
        return cls(tuple(tuple(each) for each in importance), kept)

    @property
    def count(self) -> int:
        return len(self.kept[0])

    @property
    def units(self) -> int:
        """How many there were."""
        return len(self.importance[0])

    @property
    def shares(self) -> tuple[float, ...]:
        """The part of each layer's summed importance that stays."""
        return tuple(
            sum(importance[unit] for unit in kept) / (sum(importance) or 1)
            for importance, kept in zip(self.importance, self.kept, strict=True)
        )


def width_counts(
    checkpoint: Checkpoint, model: CausalLM, wanted: Mapping[str, int | float]
) -> dict[str, int]:
    """Compute how many units stay, and check that they can be cut out.

    Args:
        wanted: by the names of the architecture's widths; a number, or a part of all of them, which
            is rounded to the width's multiple.

    Raises:
        ConversionError: where the model cannot do with so many, or packs several into one number.
    """
    counts = {}
    for name, amount in wanted.items():
        width = model.architecture.widths.get(name)
        if width is None:
            raise ConversionError(
                f"{model.model_type} models cannot be pruned by --{name}.",
                hint="Leave out layers, or prune a model such as phi-4 or phi-4-mini.",
            )
        counts[name] = _count(width, getattr(model.config, width.sizes[0]), amount)
        _check_cuts(checkpoint, model.config, width)
    return counts


def _count(width: Width, units: int, amount: int | float) -> int:
    step = width.multiple
    most = (units - 1) // step * step
    if not most:
        least = "one" if step == 1 else f"{step:,}"
        raise ConversionError(
            f"This model has {units:,} {width.unit}, and {least} at least must stay.",
            hint="Leave out something else.",
        )
    if isinstance(amount, float):
        stay = max(step, round(units * amount / step) * step)
        if stay >= units:
            raise ConversionError(
                f"{amount:g} of {units:,} {width.unit} is all of them: their number stays a "
                f"multiple of {step}.",
                hint=f"Give {most / units:.3g} or less.",
            )
        return stay
    if not 0 < amount <= most:
        raise ConversionError(
            f"{amount:,} {width.unit} are to stay, but this model has {units:,}.",
            hint=f"Give a number from 1 to {most:,}.",
        )
    return amount


def _check_cuts(checkpoint: Checkpoint, config: ModelConfig, width: Width) -> None:
    """Raise ConversionError where quantized weights hold columns of several units as one."""
    units = getattr(config, width.sizes[0])
    for name, tensor in checkpoint.tensors.items():
        is_read = name.rpartition(".")[0].endswith(f".{width.columns}")
        if is_read and len(tensor.shape) == 2 and tensor.shape[1] % units:
            raise ConversionError(
                f"{checkpoint.folder} is quantized, in groups that hold parts of several "
                f"{width.unit}: none of them can be cut out exactly.",
                hint="Prune the original model, and quantize what comes out: phimlx convert "
                "--model PRUNED --mlx-path OUT -q",
            )


def choose_widths(
    checkpoint: Checkpoint,
    counts: Mapping[str, int],
    layers: Sequence[int],
    windows: Sequence[tuple[int, ...]],
    advance: Advance = lambda percent: None,
) -> dict[str, WidthChoice]:
    """Measure the units of the layers that stay, and choose as many in each of them.

    Args:
        counts: how many stay, by the names of the architecture's widths.
        advance: called with hundredths of this work.
    """
    importance = width_importance(checkpoint, tuple(counts), layers, windows, advance)
    return {name: WidthChoice.of(importance[name], count) for name, count in counts.items()}


def width_importance(
    checkpoint: Checkpoint,
    names: Sequence[str],
    layers: Sequence[int],
    windows: Sequence[tuple[int, ...]],
    advance: Advance,
) -> dict[str, list[list[float]]]:
    """The importance of the units of each of these layers, in a model of these layers alone.

    One of them is in memory at a time; all is computed in float32.
    """
    model = map_model(checkpoint)
    model.set_dtype(mx.float32)
    batches = embed_windows(model, windows)
    del model.model.embed_tokens
    widths = {name: model.architecture.widths[name] for name in names}
    units = {name: getattr(model.config, width.sizes[0]) for name, width in widths.items()}
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    kept, number = set(layers), 0
    while model.layers:
        layer = model.layers.pop(0)
        number += 1
        if number - 1 not in kept:
            continue
        recorders = {name: SquareRecorder.into(layer, width) for name, width in widths.items()}
        for batch in batches:
            batch.x = layer(batch.x, batch.forward)
            sums = {name: recorder.squares for name, recorder in recorders.items()}
            mx.eval(batch.x, batch.forward.shared, sums)
        for name, recorder in recorders.items():
            found[name].append(recorder.importance(units[name]))
        del layer, recorders
        mx.clear_cache()
        advance(100 / len(kept))
    return found


class SquareRecorder(nn.Module):
    """Passes inputs on to a layer, and sums their squares column by column.

    Attributes:
        squares: float32 `[in]`.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.squares = mx.array(0.0)
        self.tokens = 0

    @classmethod
    def into(cls, layer: nn.Module, width: Width) -> SquareRecorder:
        """Put one in front of the projection of a decoder layer that reads a width's units."""
        recorder = cls(dict(layer.named_modules())[width.columns])
        layer.update_modules(tree_unflatten([(width.columns, recorder)]))
        return recorder

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self.squares = self.squares + mx.square(rows).sum(axis=0)
        self.tokens += rows.shape[0]
        return self.layer(x)

    def importance(self, units: int) -> list[float]:
        """The importance of units, which share the columns evenly."""
        weights = mx.square(dequantized_weight(self.layer)).sum(axis=0)
        columns = self.squares / self.tokens * weights
        importance = mx.sqrt(columns.reshape(units, -1).sum(axis=1))
        found: list[float] = importance.tolist()  # type: ignore[assignment]
        return found


def cut(
    name: str, array: mx.array, architecture: Architecture, config: ModelConfig,
    kept: Mapping[str, Sequence[int]],
) -> mx.array:  # fmt: skip
    """Leave what stays of a tensor of a decoder layer.

    Args:
        name: within its layer.
        config: of the whole model.
        kept: units that stay, by the names of the architecture's widths.
    """
    path = name.rpartition(".")[0]
    for width_name, units in kept.items():
        width = architecture.widths[width_name]
        count = getattr(config, width.sizes[0])
        if path in width.rows:
            pieces = config.fused_rows.get(path, (array.shape[0],))
            array = mx.take(array, _places(pieces, count, units), axis=0)
        elif path == width.columns and array.ndim == 2:
            array = mx.take(array, _places((array.shape[1],), count, units), axis=1)
    return array


def _places(pieces: Sequence[int], count: int, kept: Sequence[int]) -> mx.array:
    """Number the rows of the units that stay, of which each piece holds as many of every unit."""
    places, top = [], 0
    for size in pieces:
        each = size // count
        rows = top + np.asarray(kept)[:, None] * each + np.arange(each)
        places.append(rows.reshape(-1))
        top += size
    return mx.array(np.concatenate(places))
