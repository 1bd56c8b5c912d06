"""Quantization by gradients: DWQ, which trains scales and biases, and the sensitivity of layers.

Both compare a model with the original by the KL divergence of their logits, which is mlx-lm's.
Sources: `mlx_lm/quant/dwq.py` and `mlx_lm/quant/dynamic_quant.py` of mlx-lm 0.32. Their loops are
repeated here, since they print, seed global generators and patch the class of decoder layers.
Everything is computed in float32, scales and biases as they will be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from convert.measure.compare import hidden_states
from convert.quantize.recipe import Quantization
from convert.quantize.tensor import check_finite
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model, map_model
from phimlx.machine.reductions import log_softmax, long_sum
from phimlx.models.base import CausalLM, ForwardPass

Advance = Callable[[float], object]
Forms = Mapping[str, Quantization | None]
Windows = Sequence[tuple[int, ...]]
Parameters = dict[str, Any]
"""What the weights of layers are made of, by path."""

STEP_TOKENS = 512  # read by one step of training or one gradient, or one window where that is more
VALIDATION = 8  # one window in so many is kept from training
TEMPERATURE = 2.0  # that logits are divided by in training, as mlx-lm's
HIGHEST_TRAINED_BITS = 6  # 8 bits have nothing to gain


class ReweightedModel:
    """A model some of whose weights are functions of parameters, for gradients by these.

    What happens within a decoder layer is computed again in the backward pass.

    Args:
        weight_of: makes the weight `[out, in]` of a layer, given its path and its parameters.
    """

    def __init__(
        self, model: CausalLM, weight_of: Callable[[str, Any], mx.array] = lambda _, own: own
    ) -> None:
        self._model = model
        self._weight_of = weight_of
        self._modules = dict(model.named_modules())
        paths = {id(module): path for path, module in self._modules.items()}
        self._prefixes = tuple(f"{paths[id(layer)]}." for layer in model.layers)

    def __call__(self, parameters: Parameters, input_ids: mx.array) -> mx.array:
        """Compute logits, `[batch, length, vocab]`, of tokens `[batch, length]`."""
        model, forward = self._model, self._model.forward_pass(input_ids)
        outer = {path: own for path, own in parameters.items() if self._is_outside(path)}
        self._put(outer)
        x, shared = model.embed(input_ids), forward.shared
        for layer, prefix in zip(model.layers, self._prefixes, strict=True):
            inner = {path: own for path, own in parameters.items() if path.startswith(prefix)}
            x, shared = mx.checkpoint(self._call(layer, forward))(inner, x, shared)
        return model.head(model.norm(x))

    def _is_outside(self, path: str) -> bool:
        return not path.startswith(self._prefixes)

    def _put(self, parameters: Parameters) -> None:
        for path, own in parameters.items():
            self._modules[path].weight = self._weight_of(path, own)

    def _call(self, layer: nn.Module, forward: ForwardPass) -> Callable[..., Any]:
        """Call a layer as a function of all that it depends on, as `mx.checkpoint` needs it."""

        def call(parameters: Parameters, x: mx.array, shared: Any) -> tuple[mx.array, Any]:
            self._put(parameters)
            forward.shared = dict(shared)
            x = layer(x, forward)
            # Copies, since MLX loses gradients where one array is returned twice.
            return x, tree_map(lambda array: array + 0, forward.shared)

        return call


def dwq(
    checkpoint: Checkpoint,
    forms: Forms,
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
        forms: of each layer that can be quantized, by path.
        windows: of tokens, all of one length.
        dtype: of scales and biases in the output.
        seed: of the order in which windows are read.
        advance: called with hundredths of this work.

    Returns:
        The tensors of trained layers, under their names in the output, and the mean KL divergence
        from the original, in nats, on windows kept from training, before and after.

    Raises:
        ConversionError: where a weight is not finite.
    """
    from mlx.optimizers import Adam
    from mlx_lm.tuner.losses import kl_div_loss

    inputs = [mx.array(window)[None] for window in windows]
    original, states = hidden_states(checkpoint, inputs, lambda part: advance(20 * part))
    hidden = dict(zip(windows, states, strict=True))

    def targets(batch: Windows) -> mx.array:
        return original.head(mx.stack([hidden[window] for window in batch]))

    model, packed, parameters = quantized_model(checkpoint, forms, dtype)

    def weight_of(path: str, own: Mapping[str, mx.array]) -> mx.array:
        scales, biases = (own[name].astype(dtype).astype(mx.float32) for name in own)
        return mx.dequantize(packed[path], scales, biases, **_fields(forms[path]))

    student = ReweightedModel(model, weight_of)

    def divergence(parameters: Parameters) -> float:
        total = 0.0
        for window in valid:
            p = log_softmax(targets([window]))
            q = log_softmax(student(parameters, mx.array([window])))
            total += float(long_sum(mx.exp(p) * (p - q)).mean())
        return total / len(valid)

    def loss(parameters: Parameters, input_ids: mx.array, targets: mx.array) -> mx.array:
        logits = student(parameters, input_ids)
        return kl_div_loss(logits / TEMPERATURE, targets / TEMPERATURE).mean()

    size = max(1, STEP_TOKENS // len(windows[0]))
    train, valid = split(windows)
    before = divergence(parameters)
    optimizer = Adam(learning_rate=learning_rate, bias_correction=True)
    for batch in batches(train, size, steps, seed):
        gradients = mx.grad(loss)(parameters, mx.array(batch), targets(batch))
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters)
        advance(80 / steps)
    after = divergence(parameters)
    trained = {
        f"{path}.{name}": array
        for path, own in parameters.items()
        for name, array in (
            ("weight", packed[path]),
            *((name, array.astype(dtype)) for name, array in own.items()),
        )
    }
    return trained, before, after


def quantized_model(
    checkpoint: Checkpoint, forms: Forms, dtype: mx.Dtype
) -> tuple[CausalLM, dict[str, mx.array], Parameters]:
    """Round a model, its weights unpacked but for those of layers that are to be trained.

    Returns:
        The model in float32, without the weights of trained layers; these packed; and their scales
        and biases in float32, all by path.
    """
    model = map_model(checkpoint)
    check_finite("", model)
    model.set_dtype(dtype)
    packed: dict[str, mx.array] = {}
    parameters: Parameters = {}
    for path, module in model.named_modules():
        form = forms.get(path)
        if form is None:
            continue
        weight, *scales = mx.quantize(module.weight, **asdict(form))
        mx.eval(weight, scales)
        if form.mode == "affine" and form.bits <= HIGHEST_TRAINED_BITS:
            packed[path] = weight
            named = zip(("scales", "biases"), scales, strict=True)
            parameters[path] = {name: array.astype(mx.float32) for name, array in named}
            module.weight = mx.zeros(())
        else:
            scale, bias = scales[0], scales[1] if len(scales) > 1 else None
            module.weight = mx.dequantize(weight, scale, bias, **asdict(form))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters(), parameters)
    return model, packed, parameters


def split(windows: Windows) -> tuple[Windows, Windows]:
    """Divide windows into those to train on, and one in `VALIDATION` that is kept from it."""
    kept = max(1, len(windows) // VALIDATION)
    chosen = range(0, len(windows), len(windows) // kept)[:kept]
    train = [window for index, window in enumerate(windows) if index not in chosen]
    return train, [windows[index] for index in chosen]


def batches(windows: Windows, size: int, count: int, seed: int) -> list[list[tuple[int, ...]]]:
    """Draw `count` batches: all windows in one random order after the other."""
    generator = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < count * size:
        order += generator.permutation(len(windows)).tolist()
    return [
        [windows[index] for index in order[begin : begin + size]]
        for begin in range(0, count * size, size)
    ]


def sensitivities(
    checkpoint: Checkpoint,
    forms: Forms,
    windows: Windows,
    low: Quantization,
    high: Quantization,
    advance: Advance,
) -> dict[str, float]:
    """Estimate how much the divergence falls where a layer's bits go from low to high.

    To first order: the gradient of the divergence at the weights of `low`, times their distance
    from those of `high`. In memory are the model twice, and gradients of all weights twice.

    Args:
        forms: of each layer that can be quantized; those that stay as they are have no sensitivity.
        windows: of tokens, all of one length.
        advance: called with hundredths of this work.

    Returns:
        Nats for a million weights of the layer, by path.

    Raises:
        ConversionError: where a weight is not finite.
    """
    from mlx_lm.tuner.losses import kl_div_loss

    model = load_model(checkpoint, mx.float32)
    check_finite("", model)
    original = {
        path: module.weight for path, module in model.named_modules() if forms.get(path) is not None
    }
    rounded = {path: _rounded(weight, low) for path, weight in original.items()}
    student = ReweightedModel(model)

    def loss(weights: Parameters, input_ids: mx.array, targets: mx.array) -> mx.array:
        return kl_div_loss(student(weights, input_ids), targets).mean()

    gradients = {path: mx.zeros(weight.shape) for path, weight in original.items()}
    size = max(1, STEP_TOKENS // len(windows[0]))
    starts = range(0, len(windows), size)
    for start in starts:
        input_ids = mx.array(list(windows[start : start + size]))
        targets = student(original, input_ids)
        mx.eval(targets)
        more = mx.grad(loss)(rounded, input_ids, targets)
        gradients = tree_map(mx.add, gradients, more)
        del more, targets
        mx.eval(gradients)
        advance(100 * len(input_ids) / len(windows))
    found = {}
    for path, weight in original.items():
        step = rounded[path] - _rounded(weight, high)
        fall = long_sum((gradients[path] * step).reshape(-1)) / len(starts)
        found[path] = fall.item() / (weight.size / 1e6)
    return found


def _rounded(weight: mx.array, form: Quantization) -> mx.array:
    return mx.dequantize(*mx.quantize(weight, **asdict(form)), **asdict(form))


def _fields(form: Quantization | None) -> dict[str, Any]:
    assert form is not None
    return asdict(form)
