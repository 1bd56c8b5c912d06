"""A model with fewer decoder layers: those that change least are left out.

A layer's block influence is 1 − the cosine of what goes into it and what comes out, mean over
tokens (ShortGPT, arXiv 2403.03853, equation 1). Or each layer is left out in turn, and the
divergence of what the model then says is measured (SLEB, arXiv 2402.09025, leaves out blocks one by
one by what that costs; here each is left out alone).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

import phimlx
from convert.folder import (
    check_space,
    copy_companions,
    new_folder,
    refuse_existing,
    size_of,
    stamps,
)
from convert.measure.compare import Agreement, agreements, choose_windows
from convert.measure.report import BUNDLED_TEXT, MAX_TOKENS
from convert.quantize.calibration import CalibrationWindows
from convert.quantize.layerwise import WindowBatch, embed_windows
from convert.request import SHARD_BYTES
from convert.write import ShardLayout, ShardWriter, write_index
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, map_model
from phimlx.errors import ConversionError
from phimlx.hub import model_files
from phimlx.machine.reductions import log_softmax, long_sum
from phimlx.models.base import CausalLM
from phimlx.models.config import hub_dialect
from phimlx.prompt.tokenizer.tokenizer import Tokenizer

METHODS = ("influence", "divergence")
SAMPLES, LENGTH = 16, 512  # windows of calibration text, and tokens in each
LAYERS = "model.layers."

Advance = Callable[[float], object]


@dataclass(frozen=True)
class LayerChoice:
    """Layers that stay.

    Attributes:
        method: one of `METHODS`.
        importance: of each layer, by that method.
        kept: their numbers, in order.
    """

    method: str
    importance: tuple[float, ...]
    kept: tuple[int, ...]

    @classmethod
    def of(cls, method: str, importance: Sequence[float], count: int) -> LayerChoice:
        """Keep so many of the most important ones."""
        order = sorted(range(len(importance)), key=lambda layer: (-importance[layer], layer))
        return cls(method, tuple(importance), tuple(sorted(order[:count])))


def check_prunable(checkpoint: Checkpoint, layers: int) -> None:
    """Raise ConversionError where a model cannot do with so many layers."""
    checkpoint.check_runs()
    model = build_model(checkpoint.config)
    count = model.config.num_hidden_layers
    shapes = model.config.layer_shapes
    if model.architecture.adapters or any(shape != shapes[0] for shape in shapes):
        raise ConversionError(
            f"{checkpoint.folder}: the layers of {model.model_type} are of several kinds, or have "
            "adapters of their own, so none can be left out.",
            hint="Prune a model whose layers are alike, such as phi-4 or phi-4-mini.",
        )
    if not 0 < layers < count:
        raise ConversionError(
            f"{layers} layers are to stay, but this model has {count}.",
            hint=f"Give a number from 1 to {count - 1}." if count > 1 else None,
        )


def choose_layers(
    checkpoint: Checkpoint,
    layers: int,
    method: str,
    text: str | None,
    advance: Advance = lambda percent: None,
) -> LayerChoice:
    """Measure every layer on a calibration text, and choose those that stay.

    Args:
        text: in which control tokens are recognised; the bundled one where None.
        advance: called with hundredths of this work.

    Raises:
        ConversionError: where the text is too short, or the model cannot do with so many layers.
    """
    check_prunable(checkpoint, layers)
    windows = CalibrationWindows.of(checkpoint, text, SAMPLES, LENGTH, past_step=False).windows
    measure = {"influence": block_influence, "divergence": divergence_without}[method]
    return LayerChoice.of(method, measure(checkpoint, windows, advance), layers)


def block_influence(
    checkpoint: Checkpoint, windows: Sequence[tuple[int, ...]], advance: Advance
) -> list[float]:
    """The block influence of every layer, one of them in memory at a time, in float32."""
    model = map_model(checkpoint)
    model.set_dtype(mx.float32)
    batches = embed_windows(model, windows)
    found = []
    count = len(model.layers)
    while model.layers:
        layer = model.layers.pop(0)
        total = tokens = 0.0
        for batch in batches:
            out = layer(batch.x, batch.forward)
            cosines = _cosine(batch.x, out)
            mx.eval(out, cosines, batch.forward.shared)
            total += float(cosines.sum())
            tokens += cosines.size
            batch.x = out
        found.append(1 - total / tokens)
        del layer
        mx.clear_cache()
        advance(100 / count)
    return found


def divergence_without(
    checkpoint: Checkpoint, windows: Sequence[tuple[int, ...]], advance: Advance
) -> list[float]:
    """Mean KL(whole ‖ without) in nats of leaving out each layer alone; the model is in memory."""
    model = map_model(checkpoint)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    count = len(model.layers)
    totals, tokens = [0.0] * count, 0
    for batch in embed_windows(model, windows):
        whole = log_softmax(_logits(model, batch, None))
        tokens += whole.shape[0] * whole.shape[1]
        for layer in range(count):
            other = log_softmax(_logits(model, batch, layer))
            totals[layer] += float(long_sum(mx.exp(whole) * (whole - other)).sum())
            advance(100 * len(batch.x) / (len(windows) * count))
    return [total / tokens for total in totals]


def _logits(model: CausalLM, batch: WindowBatch, without: int | None) -> mx.array:
    x = batch.x
    for number, layer in enumerate(model.layers):
        if number != without:
            x = layer(x, batch.forward)
    return model.head(model.norm(x))


def _cosine(x: mx.array, y: mx.array) -> mx.array:
    """Cosine of the vectors in the last axis."""
    norms = mx.sqrt(long_sum(x * x) * long_sum(y * y))
    return long_sum(x * y) / mx.maximum(norms, 1e-30)


def write_pruned(
    checkpoint: Checkpoint, out: Path, choice: LayerChoice, advance: Callable[[int], object]
) -> int:
    """Write a folder with the layers that stay, all else as it is; returns the bytes of weights.

    It is in the layout of the Hub, which MLX reads too; in MLX's alone where it is quantized.

    Args:
        advance: called with the bytes that have been written.

    Raises:
        ConversionError: where `out` exists, or cannot be written. Nothing is left behind then.
    """
    refuse_existing(out)
    numbers = {old: new for new, old in enumerate(choice.kept)}
    tensors: dict[str, mx.array] = {}
    for name, array in checkpoint.weights().items():
        renamed = _renumbered(name, numbers)
        if renamed is not None:
            tensors[renamed] = array
    model = build_model(checkpoint.config)
    tensors = {name: array for name, array in tensors.items() if name not in model.unused}
    quantized = checkpoint.quantization is not None
    layout = ShardLayout.of(tensors.items(), SHARD_BYTES, "mlx" if quantized else "pt")
    companions = model_files.companions(checkpoint.folder)
    check_space(out, layout.nbytes + size_of(companions))
    decisive = (phimlx.__version__, stamps(checkpoint.files), choice)
    plan = hashlib.sha256(repr(decisive).encode()).hexdigest()
    with new_folder(out, plan, layout.shards) as journal:
        with ShardWriter.open(journal.folder, layout) as writer:
            for name in list(tensors):
                array = tensors.pop(name)
                writer.write(name, 0, array)
                advance(array.nbytes)
                del array
                mx.clear_cache()
            writer.sync()
        write_index(journal.folder, layout)
        copy_companions(companions, journal.folder)
        config = pruned_config(checkpoint.config, numbers)
        (journal.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return layout.nbytes


def pruned_config(config: Mapping[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    """Write the config of a model of which some layers stay, under new numbers."""
    pruned = hub_dialect(config)
    for key in ("auto_map", "_name_or_path"):
        pruned.pop(key, None)
    pruned["num_hidden_layers"] = len(numbers)
    for key in ("quantization", "quantization_config"):
        if isinstance(pruned.get(key), Mapping):
            named = ((_renumbered(name, numbers), value) for name, value in pruned[key].items())
            pruned[key] = {name: value for name, value in named if name is not None}
    return dict(sorted(pruned.items()))


def _renumbered(name: str, numbers: Mapping[int, int]) -> str | None:
    """The new name of what belongs to a layer; None where that goes."""
    if not name.startswith(LAYERS):
        return name
    number, _, rest = name.removeprefix(LAYERS).partition(".")
    new = numbers.get(int(number))
    return None if new is None else f"{LAYERS}{new}.{rest}"


def compare(
    before: Checkpoint, after: Checkpoint, text: str | None, advance: Advance
) -> tuple[Agreement, ...]:
    """Perplexity of both on a text, and how far the pruned one is from the other."""
    text = BUNDLED_TEXT.read_text("utf-8") if text is None else text
    tokens = Tokenizer.load(before.folder).encode(text, control=True)
    windows = choose_windows(len(tokens), build_model(before.config).config, MAX_TOKENS)
    return agreements(before, after, tokens, windows, advance)
