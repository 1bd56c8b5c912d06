"""An adapter as it was saved -> changes of a model's own parameters, each of them said in full."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from phimlx.adapters.adapter import Adapter
from phimlx.checkpoint.head import EMBEDDING, HEAD
from phimlx.errors import CheckpointError
from phimlx.models.base import CausalLM
from phimlx.models.lora import EmbeddingLoRA, LoRA, LoRALinear, dequantized_weight

EMBEDDING_WEIGHT, HEAD_WEIGHT = f"{EMBEDDING}.weight", f"{HEAD}.weight"
STARTS = ("pissa", "olora")  # whose share of the base weights follows from these alone


def resolved(adapter: Adapter, model: CausalLM) -> Adapter:
    """Say an adapter that fits a model in terms of its own parameters.

    A tied output head that changes otherwise than the embedding becomes one of its own. What PiSSA
    and OLoRA took out of the base weights before training becomes a part of each LoRA, as in PEFT's
    own conversion.

    Raises:
        CheckpointError: where the base weights that it needs are quantized.
    """
    if model.config.tie_word_embeddings:
        adapter = _untied(adapter)
    modules = dict(model.named_modules())
    layers = {}
    for path, layer in adapter.layers.items():
        module = modules.get(path, modules.get(EMBEDDING))
        assert module is not None
        base = module.base_layer if isinstance(module, LoRALinear) else module
        weight = adapter.weights.get(f"{path}.weight")
        if isinstance(layer, EmbeddingLoRA):
            whole = layer.magnitude is not None
            layer = layer.settled(_weight(base, weight)) if whole else layer
        elif adapter.start is not None and weight is None:
            layer = _without_start(layer, path, base, adapter.start)
        mx.eval([each for each in vars(layer).values() if isinstance(each, mx.array)])
        layers[path] = layer
    return replace(adapter, layers=layers, tied=False, start=None)


def _untied(adapter: Adapter) -> Adapter:
    """Say of a tied model's embedding and of its head what changes each."""
    layers, weights, rows = dict(adapter.layers), dict(adapter.weights), dict(adapter.rows)
    copies = set(adapter.copies)
    if adapter.tied:
        copies.discard(EMBEDDING_WEIGHT)
        if EMBEDDING_WEIGHT in weights:
            weights.pop(HEAD_WEIGHT, None)
        embedding = layers.get(EMBEDDING)
        if embedding is not None and HEAD not in layers:
            layers[HEAD] = LoRA(embedding.lora_b.T, embedding.lora_a.T, embedding.scale)
    if EMBEDDING in rows and HEAD not in rows:
        rows[HEAD] = rows[EMBEDDING]
    parted = {*layers, *rows, *(name.removesuffix(".weight") for name in copies)}
    own_head = not parted.isdisjoint((EMBEDDING, HEAD))
    # What was saved of numbers that both share goes to both, and the head's is read last.
    if HEAD_WEIGHT in weights and not copies & {HEAD_WEIGHT, EMBEDDING_WEIGHT}:
        weights[EMBEDDING_WEIGHT] = weights.pop(HEAD_WEIGHT)
    if own_head and EMBEDDING_WEIGHT in weights and EMBEDDING_WEIGHT not in copies:
        weights.setdefault(HEAD_WEIGHT, weights[EMBEDDING_WEIGHT])
    return replace(adapter, layers=layers, weights=weights, rows=rows, own_head=own_head)


def _without_start(layer: LoRA, path: str, base: nn.Module, start: str) -> LoRA:
    """Subtract from a LoRA the A and B that it began with: twice the rank, over the whole base.

    Source: peft `tuners/lora/layer.py`, `pissa_init` and `olora_init`.
    """
    if isinstance(base, nn.QuantizedLinear):
        raise CheckpointError(
            f"The adapter belongs to what {start} left of the original weights, and {path} is "
            "quantized here.",
            hint="Use the original model, not quantized, or save the adapter in PEFT with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA.",
        )
    weight = np.array(base.weight.astype(mx.float32), np.float64)  # [output, input]
    rank = layer.rank
    if start == "pissa":
        # The largest singular vectors, by the smaller of the two products with itself.
        tall = weight.shape[0] > weight.shape[1]
        _, vectors = np.linalg.eigh(weight.T @ weight if tall else weight @ weight.T)
        top = vectors[:, -rank:]
        b, a = (weight @ top, top.T) if tall else (top, top.T @ weight)
        scale = 1.0
    else:
        b = np.linalg.qr(weight[:, :rank])[0]
        a, scale = b.T @ weight, layer.scale
    factor = scale / layer.scale
    return replace(
        layer,
        lora_a=mx.concatenate([layer.lora_a.astype(mx.float32), mx.array(a.T, mx.float32)], axis=1),
        lora_b=mx.concatenate(
            [layer.lora_b.astype(mx.float32), mx.array(-factor * b.T, mx.float32)], axis=0
        ),
    )


def _weight(base: nn.Module, replaced: mx.array | None) -> mx.array:
    return dequantized_weight(base) if replaced is None else replaced
