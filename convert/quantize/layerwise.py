"""GPTQ over a whole model: one decoder layer in memory at a time, and what is done kept on disk.

Everything is computed in float32, with scales and biases as they will be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from convert.folder import Journal
from convert.quantize.gptq import HessianRecorder, gptq_quantize
from convert.quantize.recipe import Quantization
from convert.quantize.tensor import check_finite
from phimlx.checkpoint.arrays import write_arrays
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import map_model
from phimlx.files import replacing
from phimlx.models.base import CausalLM, ForwardPass

BATCH_TOKENS = 4096  # that pass a layer at once

Advance = Callable[[float], object]


@dataclass
class WindowBatch:
    """Windows of one length on their way through the layers.

    Attributes:
        x: `[windows, length, hidden]`, float32.
    """

    x: mx.array
    forward: ForwardPass


@dataclass(frozen=True)
class CalibratedModule:
    """A decoder layer, or the output head.

    Attributes:
        prefix: of the paths of its layers in the model.
        module: which holds the linear layers.
        paths: of the linear layers in the module, in the order in which they are called.
        run: computes its output for some windows.
    """

    prefix: str
    module: nn.Module
    paths: tuple[str, ...]
    run: Callable[[WindowBatch], mx.array]

    @property
    def linear_layers(self) -> dict[str, nn.Linear]:
        """Linear layers by their path in the module."""
        modules = dict(self.module.named_modules())
        found = {path: modules[path] for path in self.paths if path in modules}
        return {path: layer for path, layer in found.items() if type(layer) is nn.Linear}

    @property
    def weight_count(self) -> int:
        return sum(linear.weight.size for linear in self.linear_layers.values())


def quantize_layer_by_layer(
    checkpoint: Checkpoint,
    forms: Mapping[str, Quantization | None],
    windows: Sequence[tuple[int, ...]],
    dtype: mx.Dtype,
    journal: Journal,
    advance: Advance,
) -> dict[str, mx.array]:
    """Quantize one linear layer after the other, each on what the ones before it give it.

    In memory are one decoder layer, one linear layer's Hessian, and the hidden states of all
    windows. Each decoder layer that is done is kept in the folder, for a run that takes up where
    this one stops.

    Args:
        forms: of each layer that can be quantized, by path. Those that are not affine, and the
            embedding, are rounded.
        windows: of tokens; those of one length follow each other.
        dtype: of scales and biases in the output.
        advance: called with hundredths of this work.

    Returns:
        The tensors of the layers that were calibrated, under their names in the output.

    Raises:
        ConversionError: where a weight is not finite.
    """
    model = map_model(checkpoint)
    batches = embed_windows(model, windows)
    parts = calibrated_modules(model)
    whole = sum(part.weight_count for part in parts)
    files = [journal.folder / name for name in calibration_files(model)]
    for file in files:
        file.touch()  # a journal counts only where every file that it was opened with is there
    model.layers.clear()
    del model.model.embed_tokens
    model.set_dtype(mx.float32)
    for number, file in enumerate(files):
        part = parts.pop(0)
        part.module.set_dtype(mx.float32)
        check_finite(part.prefix, part.module)
        share = 100 * part.weight_count / whole
        if number < journal.done:
            _restore(part, forms, file)
            advance(share)
        else:
            tensors = _quantize(
                part, forms, batches, dtype, lambda size: advance(100 * size / whole)
            )
            with replacing(file) as temporary:
                write_arrays(temporary, tensors)
            journal.record(number + 1)
        for batch in batches if parts else ():
            batch.x = part.run(batch)
            mx.eval(batch.x, batch.forward.shared)
        del part
        mx.clear_cache()
    found: dict[str, mx.array] = {}
    for file in files:
        found.update(_load(file))
    return found


def calibration_files(model: CausalLM) -> list[str]:
    """Name the files that keep the tensors of each decoder layer, and of a head of its own."""
    count = model.config.num_hidden_layers + (not model.config.tie_word_embeddings)
    return [f"calibrated-{number:05d}.safetensors" for number in range(count)]


def calibrated_modules(model: CausalLM) -> list[CalibratedModule]:
    """List decoder layers in order, and the output head where it is not the embedding as well."""
    paths = {id(module): path for path, module in model.named_modules()}
    projections = model.architecture.projections

    def decoder_layer(layer: nn.Module) -> CalibratedModule:
        prefix = f"{paths[id(layer)]}."
        return CalibratedModule(
            prefix, layer, projections, lambda batch: layer(batch.x, batch.forward)
        )

    parts = [decoder_layer(layer) for layer in model.layers]
    if not model.config.tie_word_embeddings:
        path, head = paths[id(model.output_layer)], nn.Module()
        head[path] = model.output_layer
        parts.append(
            CalibratedModule("", head, (path,), lambda batch: head[path](model.norm(batch.x)))
        )
    return parts


def embed_windows(model: CausalLM, windows: Sequence[tuple[int, ...]]) -> list[WindowBatch]:
    """Embed windows for the first decoder layer, each with the rope factors of its own length."""
    batches = []
    for length, members in groupby(windows, key=len):
        rows = list(members)
        height = max(1, BATCH_TOKENS // length)
        for top in range(0, len(rows), height):
            input_ids = mx.array(rows[top : top + height])
            batch = WindowBatch(
                model.embed(input_ids).astype(mx.float32), model.forward_pass(input_ids)
            )
            mx.eval(batch.x, batch.forward.rope)
            batches.append(batch)
    return batches


def _quantize(
    part: CalibratedModule,
    forms: Mapping[str, Quantization | None],
    batches: Sequence[WindowBatch],
    dtype: mx.Dtype,
    advance: Callable[[int], object],
) -> dict[str, mx.array]:
    """Quantize a module's linear layers and leave dequantized ones in their place."""
    tensors = {}
    for path, linear in part.linear_layers.items():
        form = forms[part.prefix + path]
        if form is not None and form.mode == "affine":
            recorder = HessianRecorder(linear)
            _replace(part.module, path, recorder)
            for batch in batches:
                part.run(batch)
                mx.eval(recorder.hessian)
            parts = gptq_quantize(linear.weight, recorder.hessian, form, dtype)
            named = zip(("weight", "scales", "biases"), parts, strict=True)
            tensors.update({f"{part.prefix}{path}.{name}": array for name, array in named})
            del recorder
            _replace(part.module, path, _dequantized(linear, form, parts))
        elif form is not None:
            parts = mx.quantize(linear.weight, **asdict(form))
            _replace(part.module, path, _dequantized(linear, form, parts))
        mx.clear_cache()
        advance(linear.weight.size)
    return tensors


def _restore(part: CalibratedModule, forms: Mapping[str, Quantization | None], file: Path) -> None:
    """Leave in a module what an earlier run left that wrote `file`."""
    stored = _load(file)
    for path, linear in part.linear_layers.items():
        form, name = forms[part.prefix + path], f"{part.prefix}{path}"
        if form is None:
            continue
        parts: Sequence[mx.array] = mx.quantize(linear.weight, **asdict(form))
        if f"{name}.scales" in stored:
            parts = [stored[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
        _replace(part.module, path, _dequantized(linear, form, parts))


def _dequantized(linear: nn.Linear, form: Quantization, parts: Sequence[mx.array]) -> nn.Linear:
    """A layer with quantized weights unpacked, which many tokens at once pass more quickly."""
    packed, scales, *biases = parts
    weight = mx.dequantize(
        packed, scales, biases[0] if biases else None, dtype=mx.float32, **asdict(form)
    )
    unpacked = nn.Linear(1, 1, bias="bias" in linear)
    unpacked.update({**linear.parameters(), "weight": weight})
    mx.eval(unpacked.parameters())
    return unpacked


def _replace(module: nn.Module, path: str, layer: nn.Module) -> None:
    module.update_modules(tree_unflatten([(path, layer)]))


def _load(file: Path) -> dict[str, mx.array]:
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    return tensors
