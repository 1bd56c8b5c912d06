"""The model as it was before training, for losses that compare with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.nn as nn
from mlx.utils import tree_unflatten

from phimlx.models.base import CausalLM


class Reference:
    """Puts a model back to what it was: without its adapters, or with the weights that it had.

    Weights that are trained themselves are held once more from the first step on; adapters need
    nothing of the kind.

    Args:
        model: prepared for training, and not trained yet.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self._has_adapters = any("lora_a" in module for module in model.modules())
        self._weights = {} if self._has_adapters else model.trainable_parameters()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Use the model as it was while the block runs."""
        if self._has_adapters:
            with without_adapter(self.model):
                yield
            return
        own = self.model.trainable_parameters()
        self.model.update(self._weights)
        try:
            yield
        finally:
            self.model.update(own)


@contextmanager
def without_adapter(model: CausalLM) -> Iterator[None]:
    """The model as it was before adapters were put into its layers."""
    adapted = [(path, module) for path, module in model.named_modules() if "lora_a" in module]
    _put(model, [(path, module.linear) for path, module in adapted])
    try:
        yield
    finally:
        _put(model, adapted)


def _put(model: CausalLM, modules: Sequence[tuple[str, nn.Module]]) -> None:
    model.update_modules(tree_unflatten(list(modules)))


@contextmanager
def evaluating(model: CausalLM) -> Iterator[None]:
    """Drop nothing while the block runs."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
