"""Learning from pairs of answers, a better and a worse one: direct preference optimization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from phimlx.models.base import CausalLM
from phimlx.training.data.batches import Batch, Batches, Rows
from phimlx.training.forward import supervised_states
from phimlx.training.loss import measured_losses, token_losses
from phimlx.training.step import TrainingStep, Tree

BETA = 0.1


class PairBatches(Batches):
    """Batches of pairs: the examples of a data set are a better and a worse one, in turn.

    `batch_size` counts pairs; the two of a pair are neighbours in their batch.
    """

    @cached_property
    def _rows(self) -> Rows:
        pairs = [(i, i + 1) for i in range(0, len(self.examples), 2)]
        return sorted(pairs, key=self._length, reverse=True)

    def _mine(self, rows: Rows) -> Rows:
        return [(i,) for pair in super()._mine(rows) for i in pair]

    def _shape(self, rows: Rows) -> tuple[int, int]:
        count, length = super()._shape(rows)
        return 2 * count, length


class PreferenceStep(TrainingStep):
    """Raises a better answer's probability over a worse one's, as far as the model without its
    adapter did not prefer it already.

    The loss of a pair is −log σ(β (Δ − Δ₀)), with Δ the difference of the answers' log
    probabilities and Δ₀ the same without the adapter; the mean is over pairs.

    Args:
        beta: how far the model may move away; the smaller, the farther. The rest as in
            `TrainingStep`.

    Source: arXiv 2305.18290, equation 7.
    """

    metrics = ("accuracy", "margin")  # pairs that come out right; mean of β (Δ − Δ₀)

    def __init__(self, *arguments: Any, beta: float = BETA, **options: Any) -> None:
        self.beta = beta
        super().__init__(*arguments, **options)

    def weight_of(self, batch: Batch) -> int:
        return len(batch.sources) // 2

    def inputs(self, batch: Batch, weight: int) -> dict[str, mx.array]:
        inputs = super().inputs(batch, 1)
        inputs["example_ids"] = mx.array(batch.example_ids)
        # One entry a row, though a machine may have rows without a pair in them.
        pairs = np.arange(batch.tokens.shape[0] // 2) < self.weight_of(batch)
        inputs["share"] = mx.array(pairs / np.float32(weight), mx.float32)
        with without_adapter(self.model):
            inputs["reference"] = self._differences(inputs, mx.random.key(0), learning=False)
            mx.eval(inputs["reference"])
        return inputs

    def _loss(
        self, parameters: Tree, inputs: Mapping[str, mx.array], key: mx.array, learning: bool = True
    ) -> tuple[mx.array, ...]:
        self.model.update(parameters)
        own = self._differences(inputs, key, learning)
        margins = self.beta * (own - inputs["reference"])
        share = inputs["share"]
        return (
            -(nn.log_sigmoid(margins) * share).sum(),
            ((margins > 0) * share).sum(),
            (margins * share).sum(),
        )

    def _differences(
        self, inputs: Mapping[str, mx.array], key: mx.array, learning: bool
    ) -> mx.array:
        """log p(better) − log p(worse) of each pair, `[rows / 2]`."""
        states = supervised_states(self.model, inputs, key, self.checkpointing)
        losses_of = token_losses if learning else measured_losses
        losses = losses_of(self.model.output_layer, states, inputs["targets"])
        summed = mx.zeros(inputs["tokens"].shape[0]).at[inputs["example_ids"]]
        probabilities = summed.add(-losses * inputs["weights"])  # log, of each row's answer
        return probabilities[::2] - probabilities[1::2]


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
