"""mlx-lm's GPTQ, called on one linear layer of a model after the other.

Knows decoder layers and how far an earlier run came; the algorithm is mlx-lm's.
Everything is computed in float32, scales and biases as they will be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from convert.folder import Journal
from convert.quantize.dwq import Advance, Aside, Layers, Windows, check_finite, put, unpacked
from convert.quantize.recipe import Quantization
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, stored_parameters
from phimlx.models.base import CausalLM, ForwardPass

GPTQ_BITS = (2, 4, 8)
STACK_TOKENS = 4096  # whose activations GPTQ holds at once


@dataclass(frozen=True)
class Stack:
    """Windows of one length on their way through the layers."""

    x: mx.array  # [windows, length, hidden]
    forward: ForwardPass


class Stage(nn.Module):
    """One decoder layer, or the output head, as a model whose input is stacks of windows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __call__(self, stacks: Sequence[Stack]) -> list[mx.array]:
        return [self.layer(stack.x, stack.forward) for stack in stacks]


class Head(nn.Module):
    """The final norm and an output head of its own, called as a decoder layer is."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self._norm = model.norm
        self.lm_head = model.output_layer

    def __call__(self, x: mx.array, forward: ForwardPass) -> mx.array:
        return self.lm_head(self._norm(x))


def quantize(
    checkpoint: Checkpoint,
    layers: Layers,
    windows: Windows,
    dtype: mx.Dtype,
    journal: Journal,
    advance: Advance,
) -> dict[str, mx.array]:
    """Quantize one linear layer after the other, each on what the ones before it give it.

    In memory are one decoder layer, one layer's Hessian, and the hidden states of all windows. Each
    decoder layer that is done is kept in the folder, for a run that takes up where this one stops.

    Args:
        layers: what becomes of each; those of other than 2, 4 or 8 bits, and the embedding, are
            rounded, as without GPTQ.
        dtype: of scales and biases in the output.
        advance: called with hundredths of this work.

    Returns:
        The tensors of the layers that were learned, under their names in the output.
    """
    model = build_model(checkpoint.config)
    weights = checkpoint.weights()
    model.load_weights([(name, weights[name]) for name in stored_parameters(checkpoint, model)])
    model.eval()
    stacks = embedded(model, windows)
    stages: list[tuple[str, nn.Module]] = [
        (f"model.layers.{number}.", layer) for number, layer in enumerate(model.layers)
    ]
    if not model.config.tie_word_embeddings:
        stages.append(("", Head(model)))
    whole = sum(layer.weight.size for _, stage in stages for _, layer in linear_layers(stage))
    files = [journal.folder / name for name in stage_files(model)]
    for file in files:
        file.touch()  # a journal counts only where every file that it was opened with is there
    model.model.layers = []
    del weights, model
    for number, file in enumerate(files):
        prefix, layer = stages.pop(0)
        layer.set_dtype(mx.float32)
        check_finite(prefix, layer)
        stage, before = Stage(layer), 100 * weight_count(layer) / whole
        if number < journal.done:
            _restore(layer, prefix, layers, file)
            advance(before)
        else:
            learned = _quantize_stage(
                stage, prefix, layers, stacks, dtype, lambda size: advance(100 * size / whole)
            )
            temporary = file.with_name(f".{file.name}")
            mx.save_safetensors(str(temporary), learned)
            temporary.replace(file)
            journal.record(number + 1)
        if stages:
            for index, stack in enumerate(stacks):
                (x,) = stage([stack])
                mx.eval(x)
                stacks[index] = Stack(x, stack.forward)
        del stage, layer
        mx.clear_cache()
    found: dict[str, mx.array] = {}
    for file in files:
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        found.update(loaded)
    return found


def stage_files(model: CausalLM) -> list[str]:
    """Where GPTQ keeps what it has learned of each decoder layer, and of a head of its own."""
    count = model.config.num_hidden_layers + (not model.config.tie_word_embeddings)
    return [f"learned-{number:05d}.safetensors" for number in range(count)]


def embedded(model: CausalLM, windows: Windows) -> list[Stack]:
    """Windows as the first decoder layer sees them, each with the table for its own length."""
    stacks = []
    for length, members in groupby(windows, key=len):
        rows = list(members)
        height = max(1, STACK_TOKENS // length)
        for top in range(0, len(rows), height):
            input_ids = mx.array(rows[top : top + height])
            forward = model.forward_pass(input_ids)
            x = model.embed(input_ids).astype(mx.float32)
            mx.eval(x, forward.rope)
            stacks.append(Stack(x, forward))
    return stacks


def _quantize_stage(
    stage: Stage,
    prefix: str,
    layers: Layers,
    stacks: list[Stack],
    dtype: mx.Dtype,
    advance: Callable[[int], object],
) -> dict[str, mx.array]:
    """Quantize the linear layers of a stage in its own order; returns what was learned."""
    from mlx_lm.quant.gptq import gptq_quantize

    learned = {}
    for path, linear in linear_layers(stage.layer):
        form = layers[prefix + path]
        if form is not None and not is_learned_by_gptq(form):
            put(stage.layer, {path: settled(linear.to_quantized(**asdict(form)))})
        elif form is not None:
            others = {p: other for p, other in linear_layers(stage.layer) if p != path}
            put(stage.layer, {p: Aside(other) for p, other in others.items()})
            gptq_quantize(
                stage, stacks, form.bits, form.group_size, form.bits, form.group_size, batch_size=1
            )
            quantized = dict(stage.layer.named_modules())[path]
            quantized.set_dtype(dtype)
            for kind in ("weight", "scales", "biases"):
                learned[f"{prefix}{path}.{kind}"] = quantized[kind]
            put(stage.layer, {**others, path: settled(quantized)})
            mx.clear_cache()
        advance(linear.weight.size)
    return learned


def _restore(layer: nn.Module, prefix: str, layers: Layers, file: Path) -> None:
    """Quantize a stage as an earlier run did that left `file`."""
    stored = mx.load(str(file))
    assert isinstance(stored, dict)
    for path, linear in linear_layers(layer):
        form = layers[prefix + path]
        if form is None:
            continue
        quantized = linear.to_quantized(**asdict(form))
        if is_learned_by_gptq(form):
            for kind in ("weight", "scales", "biases"):
                quantized[kind] = stored[f"{prefix}{path}.{kind}"]
        put(layer, {path: settled(quantized)})


def settled(quantized: nn.QuantizedLinear) -> Aside:
    """A quantized layer as plain numbers, which many tokens at once pass more quickly."""
    linear = nn.Linear(1, 1, bias=False)
    quantized.set_dtype(mx.float32)  # numbers as exact as the stored scales
    linear.weight = unpacked(quantized).astype(mx.float32)
    mx.eval(linear.weight)
    return Aside(linear)


def is_learned_by_gptq(form: Quantization) -> bool:
    return form.mode == "affine" and form.bits in GPTQ_BITS


def linear_layers(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Paths and layers, in the order in which a decoder layer calls them."""
    leaves = dict(tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module))
    return [(path, leaf) for path, leaf in leaves.items() if type(leaf) is nn.Linear]


def weight_count(module: nn.Module) -> int:
    return sum(linear.weight.size for _, linear in linear_layers(module))
