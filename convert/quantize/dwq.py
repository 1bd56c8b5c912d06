"""mlx-lm's DWQ and sensitivity estimate, called on our models.

Knows what those functions expect of a model and how to give it to them; the algorithms are theirs.
Everything is computed in float32, scales and biases as they will be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from convert.measure.compare import hidden_states
from convert.quantize.recipe import Quantization
from convert.quantize.tensor import is_finite
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, load_model, stored_parameters
from phimlx.errors import ConversionError
from phimlx.machine.reductions import log_softmax, long_sum
from phimlx.models.base import CausalLM
from phimlx.models.phi3 import DecoderLayer

Advance = Callable[[float], object]
Layers = Mapping[str, Quantization | None]
Windows = Sequence[tuple[int, ...]]

STEP_TOKENS = 512  # read by one step of training or one gradient, or one window where that is more
VALIDATION = 8  # one window in so many is kept from training


class Aside(nn.Module):
    """A layer out of sight of whoever looks for layers to quantize."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = lambda: layer

    def __call__(self, x: mx.array) -> mx.array:
        return self._layer()(x)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._layer().as_linear(x)


class UnpackedLinear(nn.QuantizedLinear):
    """A quantized layer that multiplies plain numbers, which is quicker for as many tokens as
    training reads, and many times so for its gradient on a CPU."""

    def __call__(self, x: mx.array) -> mx.array:
        return x @ unpacked(self).T


class UnpackedEmbedding(nn.QuantizedEmbedding):
    """The same of an embedding that is the output head as well."""

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ unpacked(self).T


UNPACKED: dict[type[nn.Module], type[nn.Module]] = {
    nn.QuantizedLinear: UnpackedLinear,
    nn.QuantizedEmbedding: UnpackedEmbedding,
}


def unpacked(layer: nn.Module) -> mx.array:
    """A quantized layer's weight in plain numbers, [out, in], of the type of its scales."""
    return mx.dequantize(
        layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode
    )


class Student(nn.Module):
    """A quantized model that computes in float32 with the scales that it is given, of any type."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def __call__(self, input_ids: mx.array) -> mx.array:
        scales = self.trainable_parameters()
        self.update(tree_map(lambda array: array.astype(mx.float32), scales))
        return self.model(input_ids)

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers


class Counted:
    """A table of windows that tells when some are asked for."""

    def __init__(self, windows: mx.array, advance: Callable[[int], object]) -> None:
        self._windows = windows
        self._advance = advance

    def __len__(self) -> int:
        return self._windows.shape[0]

    def __getitem__(self, rows: slice) -> mx.array:
        found = self._windows[rows]
        self._advance(found.shape[0])
        return found


def put(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Replace layers, by their paths."""
    module.update_modules(tree_unflatten(list(layers.items())))


def check_finite(prefix: str, module: nn.Module) -> None:
    """Raise `ConversionError` where a weight is NaN or infinite, which learning would spread."""
    for name, array in dict(tree_flatten(module.parameters())).items():
        if not is_finite(array).item():
            raise ConversionError(
                f"{prefix}{name} holds NaN or infinity: this model is damaged.",
                hint="Download it again.",
            )


def dwq(
    checkpoint: Checkpoint,
    layers: Layers,
    windows: Windows,
    dtype: mx.Dtype,
    steps: int,
    learning_rate: float,
    seed: int,
    advance: Advance,
) -> tuple[dict[str, mx.array], float, float]:
    """Train the scales and biases of a quantized model towards the original's logits.

    In memory are the quantized model, the training of its scales, the original's output head in
    float32, and its hidden states of all windows. Layers of 8 bits are not trained.

    Args:
        layers: what becomes of each.
        windows: all of one length.
        dtype: of scales and biases in the output.
        advance: called with hundredths of this work.

    Returns:
        The tensors of quantized layers, under their names in the output, and the mean KL divergence
        from the original, in nats, on windows kept from training, before and after.
    """
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize

    inputs = [mx.array(window)[None] for window in windows]
    head, states = hidden_states(checkpoint, inputs, lambda part: advance(20 * part))
    seen = dict(zip(windows, states, strict=True))

    def targets(batch: mx.array, step: int, split: str) -> mx.array:
        if split == "train":
            advance(80 / steps)
        rows: list[list[int]] = batch.tolist()  # type: ignore[assignment]
        return head.head(mx.stack([seen[tuple(row)] for row in rows]))

    size = max(1, STEP_TOKENS // len(windows[0]))
    kept = max(size, len(windows) // VALIDATION)
    distance = len(windows) // kept
    valid = list(windows[::distance][:kept])
    train = [window for window in windows if window not in set(valid)]
    generator = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < steps * size:
        order += generator.permutation(len(train)).tolist()
    chosen = [(train[index], 0) for index in order[: steps * size]]

    student = Student(quantized_model(checkpoint, layers, dtype))
    before = divergence(student, valid, targets)
    with plain_layers():
        dwq_quantize(
            student,
            targets,
            Adam(learning_rate=learning_rate, bias_correction=True),
            chosen,
            [(window, 0) for window in valid],
            batch_size=size,
            max_seq_length=len(windows[0]) + 1,
            seed=seed,
            dtype=dtype,
            gradient_checkpoint=True,
        )
    student.eval()
    after = divergence(student, valid, targets)
    learned = {
        name: array if array.dtype == mx.uint32 else array.astype(dtype)
        for path, module in student.model.named_modules()
        if layers.get(path) is not None
        for name, array in dict(tree_flatten(module.parameters(), prefix=f".{path}")).items()
    }
    return learned, before, after


def quantized_model(checkpoint: Checkpoint, layers: Layers, dtype: mx.Dtype) -> CausalLM:
    """The model as it would be stored without learning; nothing of it is to be trained."""
    model = build_model(checkpoint.config)
    weights = checkpoint.weights()
    model.load_weights([(name, weights[name]) for name in stored_parameters(checkpoint, model)])
    del weights
    check_finite("", model)
    model.set_dtype(dtype)

    def form(path: str, module: nn.Module) -> bool | dict[str, Any]:
        chosen = layers.get(path)
        return False if chosen is None else asdict(chosen)

    nn.quantize(model, class_predicate=form)
    for module in model.modules():
        module.__class__ = UNPACKED.get(type(module), type(module))
    model.freeze()
    model.set_dtype(mx.float32)
    for layer in (*model.layers, model):
        mx.eval(layer.parameters())
        mx.clear_cache()
    return model


def divergence(
    student: Student, windows: Windows, targets: Callable[[mx.array, int, str], mx.array]
) -> float:
    """Mean KL divergence of a student's logits from the original's, in nats."""
    total = 0.0
    for window in windows:
        input_ids = mx.array(window)[None]
        p, q = targets(input_ids, 0, "valid"), student(input_ids)
        p, q = log_softmax(p), log_softmax(q)
        total += float(long_sum(mx.exp(p) * (p - q)).mean())
    return total / len(windows)


@contextmanager
def plain_layers() -> Iterator[None]:
    """Undo afterwards what gradient checkpointing does to every decoder layer there is."""
    call = DecoderLayer.__call__
    try:
        yield
    finally:
        DecoderLayer.__call__ = call  # type: ignore[method-assign]


def sensitivities(
    checkpoint: Checkpoint,
    layers: Layers,
    windows: Windows,
    low: Quantization,
    high: Quantization,
    advance: Advance,
) -> dict[str, float]:
    """How much the divergence falls, to first order, where a layer's bits go from low to high.

    In memory are the model twice, and gradients of all weights twice.

    Args:
        layers: what becomes of each; those that stay as they are have no sensitivity.
        windows: all of one length.
        advance: called with hundredths of this work.

    Returns:
        By path, for each weight of the layer alike.
    """
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities

    model = load_model(checkpoint, mx.float32)
    check_finite("", model)
    staying = {p: Aside(m) for p, m in model.named_modules() if p in layers and layers[p] is None}
    put(model, staying)
    count = len(windows)
    data = Counted(mx.array(list(windows)), lambda rows: advance(100 * rows / count))
    with plain_layers():
        found: list[tuple[str, float]] = estimate_sensitivities(
            model,
            data,
            low.bits,
            low.group_size,
            high.bits,
            high.group_size,
            batch_size=max(1, STEP_TOKENS // len(windows[0])),
            gradient_checkpoint=True,
        )
    return dict(found)
