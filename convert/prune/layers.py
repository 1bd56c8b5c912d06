"""Which decoder layers stay: those that change least are left out.

A layer's block influence is 1 − the cosine of what goes into it and what comes out, mean over
tokens (ShortGPT, arXiv 2403.03853, equation 1). Or each layer is left out in turn, and the
divergence of what the model then says is measured (SLEB, arXiv 2402.09025, leaves out blocks one by
one by what that costs; here each is left out alone).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from convert.measure.compare import HEAD_ROWS
from convert.quantize.layerwise import WindowBatch, embed_windows
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import map_model
from phimlx.errors import ConversionError
from phimlx.machine.reductions import log_softmax, long_sum
from phimlx.models.base import CausalLM

METHODS = ("influence", "divergence")

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


def check_layers(model: CausalLM, layers: int) -> None:
    """Raise ConversionError where a model cannot do with so many layers."""
    count = model.config.num_hidden_layers
    if not 0 < layers < count:
        raise ConversionError(
            f"{layers} layers are to stay, but this model has {count}.",
            hint=f"Give a number from 1 to {count - 1}." if count > 1 else None,
        )


def choose_layers(
    checkpoint: Checkpoint,
    layers: int,
    method: str,
    windows: Sequence[tuple[int, ...]],
    advance: Advance = lambda percent: None,
) -> LayerChoice:
    """Measure every layer on windows of tokens, and choose those that stay.

    Args:
        advance: called with hundredths of this work.
    """
    measure = {"influence": block_influence, "divergence": divergence_without}[method]
    return LayerChoice.of(method, measure(checkpoint, windows, advance), layers)


def block_influence(
    checkpoint: Checkpoint, windows: Sequence[tuple[int, ...]], advance: Advance
) -> list[float]:
    """The block influence of every layer, one of them in memory at a time, in float32."""
    model = map_model(checkpoint)
    model.set_dtype(mx.float32)
    batches = embed_windows(model, windows)
    del model.model.embed_tokens
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
    count = len(model.layers)
    totals, tokens = [0.0] * count, 0
    for batch in embed_windows(model, windows):
        whole = _states(model, batch, None)
        tokens += len(whole)
        for layer in range(count):
            totals[layer] += _divergence(model, whole, _states(model, batch, layer))
            advance(100 * len(batch.x) / (len(windows) * count))
    return [total / tokens for total in totals]


def _states(model: CausalLM, batch: WindowBatch, without: int | None) -> mx.array:
    """What the output head reads, `[tokens, hidden]`, where a layer is left out."""
    x = batch.x
    for number, layer in enumerate(model.layers):
        if number != without:
            x = layer(x, batch.forward)
            mx.eval(x, batch.forward.shared)
    return model.norm(x).reshape(-1, x.shape[-1])


def _divergence(model: CausalLM, whole: mx.array, other: mx.array) -> float:
    """Sum KL(whole ‖ other) over tokens, of which few have their logits at a time."""
    total = 0.0
    for top in range(0, len(whole), HEAD_ROWS):
        rows = slice(top, top + HEAD_ROWS)
        p, q = (log_softmax(model.head(states[rows])) for states in (whole, other))
        total += float(long_sum(mx.exp(p) * (p - q)).sum())
    return total


def _cosine(x: mx.array, y: mx.array) -> mx.array:
    """Cosine of the vectors in the last axis."""
    norms = mx.sqrt(long_sum(x * x) * long_sum(y * y))
    return long_sum(x * y) / mx.maximum(norms, 1e-30)
