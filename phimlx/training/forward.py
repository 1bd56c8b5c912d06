"""A batch of examples -> the model's hidden states where something is to be learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from phimlx.models.base import CausalLM, ForwardPass
from phimlx.models.lora import Routing
from phimlx.models.multimodal import MultimodalLM
from phimlx.models.rope import Rope
from phimlx.models.shares import Share
from phimlx.training.data.batches import Batch, rounded
from phimlx.training.data.media import MediaItem

Adapters = tuple[tuple[str | None, ...], ...]
"""For each kind of adapter the name of each row's, as `Routing` takes them."""

SMALLEST = 64  # rows of features of a kind

Features = Callable[[MediaItem], mx.array]
"""Makes or finds the features of a picture or a sound, before any projection, `[tokens, width]`."""


def inputs_of(batch: Batch, rope: Rope) -> dict[str, mx.array]:
    """Hand a batch to the device.

    Returns:
        tokens, positions, target_indices, targets, weights and, of packed rows, segments as in
        `Batch`; cos and sin, as a `Rope` makes them, from the table that each example's own length
        calls for.
    """
    names = ("tokens", "positions", "target_indices", "targets", "weights", "segments")
    arrays = {name: getattr(batch, name) for name in names}
    inputs = {name: mx.array(array) for name, array in arrays.items() if array is not None}
    inputs["cos"], inputs["sin"] = rope.by_token(mx.array(batch.positions), batch.lengths)
    return inputs


def media_inputs(batch: Batch, model: CausalLM, features: Features) -> dict[str, mx.array]:
    """Make what stands at a batch's placeholders: features, and the places of their rows.

    Numbers of rows are rounded up, so that there are few shapes; what that adds goes nowhere.

    Args:
        features: makes or finds those of a picture or a sound, before any projection.

    Returns:
        For each kind "image" and, by the adapter of the row, "audio.speech" or "audio.vision":
        the features under that name, and under "places." and the name where each goes.
    """
    found: dict[str, list[tuple[mx.array, np.ndarray]]] = {}
    for each in batch.media:
        item = each.item
        name = item.kind
        if item.kind == "audio":
            modality = batch.modalities[each.place // batch.tokens.shape[1]]
            name = f"audio.{own_adapter(model, modality)}"
        places = each.place + np.arange(item.tokens)
        found.setdefault(name, []).append((features(item), places))
    nowhere = batch.tokens.size
    inputs = {}
    for name, parts in found.items():
        rows = mx.concatenate([rows for rows, _ in parts])
        places = np.concatenate([places for _, places in parts])
        more = rounded(len(places), SMALLEST) - len(places)
        inputs[name] = mx.pad(rows, [(0, more), (0, 0)])
        inputs[f"places.{name}"] = mx.array(np.append(places, [nowhere] * more).astype(np.int32))
    return inputs


def own_adapter(model: CausalLM, modality: str) -> str | None:
    """Name the checkpoint's own adapter of rows that hold something; None for none."""
    assert model.placeholders is not None
    names = {held: name for name, held in model.placeholders.modalities.items()}
    return names.get(modality)


def adapters_of(model: CausalLM, batch: Batch) -> Adapters:
    """Name what each row uses of the loaded adapters, and of the checkpoint's own."""
    held = batch.modalities or ("text",) * batch.tokens.shape[0]
    has_own = model.architecture.adapters
    used = [
        model.loaded_routes.of_row(
            model.default_adapter, own_adapter(model, modality) if has_own else None, modality
        )
        for modality in held
    ]
    return tuple(loaded for loaded, _ in used), tuple(own for _, own in used)


class Dropout(nn.Module):
    """Zeroes a part `p` of its input, drawn from a key that it is given, not from a global state.

    Where it has been given none, as outside training, its input passes through.

    Args:
        share: which part of a whole input is this machine's, where several share its columns: all
            draw for the whole, as one machine does.
    """

    def __init__(self, p: float, share: Share | None = None) -> None:
        super().__init__()
        self.p = p
        self.share = share
        self._key: mx.array | None = None

    def take(self, key: mx.array) -> mx.array:
        """Draw from this key next; returns another one for whoever comes after."""
        # The bits that come of a key have no gradient, which `mx.checkpoint` would ask for.
        self._key, rest = mx.random.split(mx.stop_gradient(key))
        return rest

    def __call__(self, x: mx.array) -> mx.array:
        if self._key is None or not self.training:
            return x
        shape = x.shape if self.share is None else self.share.whole_shape(x, x.ndim - 1)
        kept = mx.random.bernoulli(1 - self.p, shape, key=self._key)
        if self.share is not None:
            kept = self.share.part(kept, kept.ndim - 1)
        return mx.where(kept, x / (1 - self.p), 0)


def supervised_states(
    model: CausalLM,
    inputs: Mapping[str, mx.array],
    key: mx.array,
    checkpointing: bool = False,
    adapters: Adapters = (),
) -> mx.array:
    """Compute what the output head sees at the places to learn from, `[n, hidden]`.

    Equal to running each example by itself: attention and positions stay inside it.

    Args:
        inputs: from `inputs_of`, and from `media_inputs` where there are media.
        key: from `mx.random.key`; what dropout draws follows from it alone.
        checkpointing: keep only each layer's input for the backward pass; compute the rest again.
        adapters: that the rows use, from `adapters_of`; where nothing is given the one that the
            model was loaded with.
    """
    mask = _mask(inputs, model.config.sliding_window)
    x = _with_media(model, model.embed(inputs["tokens"]), inputs)
    adapters = adapters or ((model.default_adapter,) * x.shape[0],)
    routing = Routing(*adapters) if any(map(any, adapters)) else None
    forward = ForwardPass(
        inputs["positions"], mask, (inputs["cos"], inputs["sin"]), routing=routing
    )
    for layer, layer_key in zip(model.layers, mx.random.split(key, len(model.layers)), strict=True):
        x = _run(layer, x, forward, layer_key, checkpointing)
    x = x.reshape(-1, x.shape[-1])[inputs["target_indices"]]
    return model.norm(x)


def _with_media(model: CausalLM, x: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
    """Put features in the places of placeholders, as rows of the language model."""
    names = [name for name in inputs if f"places.{name}" in inputs]
    if not names:
        return x
    assert isinstance(model, MultimodalLM)
    flat = mx.pad(x.reshape(-1, x.shape[-1]), [(0, 1), (0, 0)])  # a row for what goes nowhere
    for name in names:
        kind, _, adapter = name.partition(".")
        rows = inputs[name]
        made = model.project_images(rows) if kind == "image" else model.project_audio(rows, adapter)
        flat[inputs[f"places.{name}"]] = made.astype(x.dtype)
    return flat[:-1].reshape(x.shape)


def _mask(inputs: Mapping[str, mx.array], window: int | None) -> mx.array | str:
    """Make the mask of attention inside each example, in the model's window where it has one."""
    length = inputs["tokens"].shape[1]
    if "segments" not in inputs and (window is None or length <= window):
        return "causal"
    columns = mx.arange(length)
    seen = columns[:, None] >= columns[None]
    if window is not None:
        seen = seen & (columns[:, None] - columns[None] < window)
    if "segments" not in inputs:
        return seen
    same = inputs["segments"][:, :, None] == inputs["segments"][:, None, :]
    return (same & seen)[:, None]  # [rows, 1, length, length]


def _run(
    layer: nn.Module,
    x: mx.array,
    forward: ForwardPass,
    key: mx.array,
    checkpointing: bool,
) -> mx.array:
    """Run a layer as a function of all that it depends on, as `mx.checkpoint` needs it."""

    def call(
        parameters: dict[str, Any], x: mx.array, key: mx.array, shared: dict[str, Any]
    ) -> tuple[mx.array, dict[str, Any]]:
        layer.update(parameters)
        forward.shared = dict(shared)
        # The same key when it is called again backward, or other numbers would be dropped.
        for module in layer.modules():
            if isinstance(module, Dropout):
                key = module.take(key)
        x = layer(x, forward)
        # Copies, since MLX loses gradients where one array is returned twice.
        return x, tree_map(lambda array: array + 0, forward.shared)

    if checkpointing:
        call = mx.checkpoint(call)
    x, forward.shared = call(layer.trainable_parameters(), x, key, forward.shared)
    return x
