"""Adapters of projections that a model here has in one, with others below each other.

A LoRA on each of several projections is one LoRA on their rows together: its A are all of theirs,
and its B is block-diagonal. What DoRA learns is a length for each row, which stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from phimlx.adapters.adapter import LAYER, Adapter
from phimlx.errors import CheckpointError, some
from phimlx.models.base import CausalLM
from phimlx.models.lora import LoRA, LoRALinear, dequantized_weight


def fused(adapter: Adapter, model: CausalLM) -> Adapter:
    """Say an adapter of split projections in terms of a model's fused ones; others as they are.

    Args:
        model: with its weights, which may be mapped: where DoRA changes some of the rows, the
            lengths of the others are read.

    Raises:
        CheckpointError: where it was made for projections of other sizes.
    """
    layers, weights = dict(adapter.layers), dict(adapter.weights)
    modules = dict(model.named_modules())
    own = dict(tree_flatten(model.parameters())) if weights else {}
    blocks = {f"model.layers.{found[1]}" for name in adapter.arrays if (found := LAYER.match(name))}
    for path, rows in model.config.fused_rows.items():
        pieces = model.architecture.pieces(path, rows)
        for block in blocks:
            whole, sizes = f"{block}.{path}", {f"{block}.{key}": n for key, n in pieces.items()}
            there = {piece: layers.pop(piece) for piece in sizes if piece in layers}
            if there and whole in modules:
                _check_start(adapter, there)
                _check_alone(there, whole, layers)
                layers[whole] = _joined(there, sizes, modules[whole])
            names = {f"{piece}.weight": n for piece, n in sizes.items()}
            known = f"{whole}.weight" in own
            replaced = {name: weights.pop(name) for name in names if known and name in weights}
            if replaced:
                _check_alone(replaced, f"{whole}.weight", weights)
                weights[f"{whole}.weight"] = _stacked(replaced, names, own[f"{whole}.weight"])
    return replace(adapter, layers=layers, weights=weights)


def _check_start(adapter: Adapter, pieces: Mapping[str, Any]) -> None:
    if adapter.start is not None:
        raise CheckpointError(
            f"The adapter began with what {adapter.start} took out of the weights of "
            f"{some(list(pieces))}, which this model has in one.",
            hint="Save it in PEFT with path_initial_model_for_weight_conversion, which makes it a "
            "plain LoRA.",
        )


def _check_alone(pieces: Mapping[str, Any], whole: str, others: Mapping[str, Any]) -> None:
    if whole in others:
        raise CheckpointError(f"The adapter changes {whole}, and {some(list(pieces))} in it too.")


def _joined(pieces: Mapping[str, LoRA], sizes: Mapping[str, int], module: Any) -> LoRA:
    """Make one LoRA of those of a layer's rows, in order.

    Args:
        sizes: rows of every piece, those without a LoRA too.
    """
    scale = next(iter(pieces.values())).scale
    rank, total = sum(layer.rank for layer in pieces.values()), sum(sizes.values())
    top, used = 0, 0
    b, magnitudes, biases = [], [], []
    for piece, count in sizes.items():
        layer = pieces.get(piece)
        bias = None if layer is None else layer.bias
        if layer is None:
            magnitude = None
        else:
            _check_rows(f"{piece}.lora_b", layer.lora_b.shape, (layer.rank, count))
            share = layer.lora_b if layer.scale == scale else layer.lora_b * (layer.scale / scale)
            below = rank - used - layer.rank
            b.append(mx.pad(share, [(used, below), (top, total - top - count)]))
            used += layer.rank
            magnitude = layer.magnitude
            bias = bias if bias is None else bias * (layer.scale / scale)
        magnitudes.append((magnitude, top, count))
        biases.append(mx.zeros(count) if bias is None else bias)
        top += count
    changed: dict[str, Any] = {}
    if any(magnitude is not None for magnitude, _, _ in magnitudes):
        changed["magnitude"] = mx.concatenate([_lengths(module, *each) for each in magnitudes])
    if any(layer.bias is not None for layer in pieces.values()):
        changed["bias"] = mx.concatenate(biases)
    widths = {layer.lora_a.shape[0] for layer in pieces.values()}
    if len(widths) > 1:
        raise CheckpointError(f"The adapter's {some(list(pieces))} take inputs of other widths.")
    return LoRA(
        mx.concatenate([pieces[piece].lora_a for piece in sizes if piece in pieces], axis=1),
        sum(b[1:], b[0]),
        scale,
        **changed,
    )


def _lengths(module: Any, magnitude: mx.array | None, top: int, count: int) -> mx.array:
    """Lengths of rows that DoRA has learned, or the layer's own where it has not."""
    if magnitude is not None:
        _check_rows("its magnitude", magnitude.shape, (count,))
        return magnitude
    base = module.base_layer if isinstance(module, LoRALinear) else module
    return mx.linalg.norm(dequantized_weight(base)[top : top + count], axis=1)


def _stacked(pieces: Mapping[str, mx.array], sizes: Mapping[str, int], own: mx.array) -> mx.array:
    """Put weights below each other; rows of the model's own where a piece is not there."""
    rows, top = [], 0
    for name, count in sizes.items():
        if name in pieces:
            _check_rows(name, pieces[name].shape, (count, *pieces[name].shape[1:]))
            rows.append(pieces[name])
        elif mx.issubdtype(own.dtype, mx.floating):
            rows.append(own[top : top + count])
        else:
            raise CheckpointError(
                f"The adapter replaces {some(list(pieces))}, and the rows beside it are quantized "
                "here.",
                hint="Full fine-tuning goes with the model that it started from, not quantized.",
            )
        top += count
    return mx.concatenate(rows)


def _check_rows(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise CheckpointError(
            f"The adapter was made for another model: {name} has shape {list(shape)}, and this one "
            f"needs {list(wanted)}."
        )
