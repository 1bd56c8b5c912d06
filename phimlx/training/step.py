"""One optimizer step: losses, gradients, their sum over micro-batches and machines, the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from phimlx.errors import TrainingError
from phimlx.machine.device import on_gpu
from phimlx.machine.exiting import COMPUTING
from phimlx.machine.reductions import long_sum
from phimlx.models.base import CausalLM
from phimlx.training.data.batches import Batch
from phimlx.training.forward import (
    Adapters,
    Features,
    adapters_of,
    inputs_of,
    media_inputs,
    supervised_states,
)
from phimlx.training.loss import linear_cross_entropy, measured_losses
from phimlx.training.together import Alone
from phimlx.training.together import Tree as Tree

Traced = Callable[[Tree, Mapping[str, mx.array], mx.array], tuple[Sequence[mx.array], Tree]]


@dataclass(frozen=True)
class StepResult:
    """Result of one step, over all machines."""

    loss: float  # mean over what is learned from, before the update
    weight: int  # how much that is
    supervised_tokens: int
    real_tokens: int
    gradient_norm: float  # before clipping
    metrics: Mapping[str, float]  # further means that the kind of loss has to tell


class NonFiniteError(TrainingError):
    """A loss or a gradient that is no number; the weights are as they were before the step."""


class TrainingStep:
    """Trains what is not frozen in a model, a step at a time.

    The gradients are those of the mean loss over all supervised tokens of the step, however these
    are spread over micro-batches and machines.

    Args:
        clip: largest norm of all gradients together; None for none.
        checkpointing: trade time for memory; see `supervised_states`.
        seed: for dropout; a step draws the same numbers whenever it is run.
        together: the machines that share each step; this one alone where None.
        features: of the pictures and sounds in batches; None where there are none.
    """

    def __init__(
        self,
        model: CausalLM,
        optimizer: optim.Optimizer,
        *,
        clip: float | None = None,
        checkpointing: bool = False,
        seed: int = 0,
        together: Alone | None = None,
        features: Features | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip = clip
        self.checkpointing = checkpointing
        self.seed = seed
        self.together = together or Alone()
        self.features = features
        self._adapters: Adapters = ()  # of the batch whose inputs were made last
        self._traces: dict[Adapters, Traced] = {}

    @COMPUTING
    def __call__(self, number: int, batches: Sequence[Batch]) -> StepResult:
        """Learn from the micro-batches of step `number`, this machine's part of each.

        Raises:
            NonFiniteError: naming the example; nothing has been updated.
        """
        counts = [
            sum(map(count, batches))
            for count in (self.weight_of, lambda b: b.supervised_tokens, lambda b: b.real_tokens)
        ]
        weight, supervised, real = self.together.totals(mx.array(counts))
        values: Sequence[mx.array] = ()
        gradients: Tree = {}
        for place, batch in enumerate(batches):
            found, slopes = self._gradients(batch, weight, number, place)
            values = [a + b for a, b in zip(values, found, strict=True)] if values else found
            gradients = tree_map(mx.add, gradients, slopes) if gradients else slopes
            mx.eval(values, gradients)
        gradients = self.together.sum_gradients(gradients)
        loss, *metrics = self.together.totals(mx.stack(list(values)))
        norm = self.together.norm(gradients)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self._blame(number, batches)
        if self.clip is not None and norm > self.clip:
            scale = self.clip / norm
            gradients = tree_map(lambda gradient: gradient * scale, gradients)
        self.optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        told = dict(zip(self.metrics, metrics, strict=True))
        return StepResult(loss, weight, supervised, real, norm, told)

    @COMPUTING
    def evaluate(self, batches: Iterable[Batch]) -> StepResult:
        """The mean loss over batches, this machine's part of each; nothing is learned or dropped.

        All machines call it together.
        """
        totals = np.zeros(4 + len(self.metrics))
        parameters = self.model.trainable_parameters()
        self.model.eval()
        try:
            for batch in batches:
                weight = self.weight_of(batch)
                inputs = self.inputs(batch, max(weight, 1))
                values = self._loss(parameters, inputs, mx.random.key(0), learning=False)
                row = mx.stack(list(values))
                mx.eval(row)
                found = np.array(row, np.float64) * weight
                totals += [weight, batch.supervised_tokens, batch.real_tokens, *found]
        finally:
            self.model.train()
        summed = self.together.totals(mx.array(totals.astype(np.float32)))
        weight, supervised, real = summed[:3]
        loss, *metrics = (each / max(weight, 1) for each in summed[3:])
        told = dict(zip(self.metrics, metrics, strict=True))
        return StepResult(loss, int(weight), int(supervised), int(real), 0.0, told)

    # What another kind of loss replaces.

    metrics: tuple[str, ...] = ()  # names of what `_loss` returns beside the loss

    def weight_of(self, batch: Batch) -> int:
        """Count what a batch has to learn from; the loss is a mean over that."""
        return batch.supervised_tokens

    def units(self, batch: Batch) -> Iterable[Sequence[int]]:
        """List the examples of a batch that make a loss together, by their places in it."""
        learned = set(batch.example_ids[batch.weights > 0].tolist())
        return [(place,) for place in range(len(batch.examples)) if place in learned]

    def inputs(self, batch: Batch, weight: int) -> dict[str, mx.array]:
        """Make the inputs of `_loss`, of a batch that is part of `weight` things to learn from."""
        weighted = replace(batch, weights=batch.weights / np.float32(weight))
        self._adapters = adapters_of(self.model, batch)
        inputs = inputs_of(weighted, self.model.config.rope)
        if batch.media:
            assert self.features is not None
            inputs |= media_inputs(batch, self.model, self.features)
        return inputs

    def _loss(
        self, parameters: Tree, inputs: Mapping[str, mx.array], key: mx.array, learning: bool = True
    ) -> tuple[mx.array, ...]:
        """The batch's part of the loss, and of each of `metrics`."""
        self.model.update(parameters)
        states = supervised_states(self.model, inputs, key, self.checkpointing, self._adapters)
        head, targets, weights = self.model.output_layer, inputs["targets"], inputs["weights"]
        if learning:
            return (linear_cross_entropy(head, states, targets, weights),)
        return (long_sum(measured_losses(head, states, targets) * weights),)

    def _gradients(
        self, batch: Batch, weight: int, number: int, place: int
    ) -> tuple[Sequence[mx.array], Tree]:
        """One batch's part of the mean over `weight` things, and its gradients."""
        entropy = np.random.SeedSequence([self.seed, number, place, self.together.rank])
        inputs = self.inputs(batch, weight)
        parameters = self.model.trainable_parameters()
        try:
            return self._traced()(parameters, inputs, mx.array(entropy.generate_state(2)))
        finally:
            self.model.update(parameters)  # tracing put its own arrays in their place

    def _traced(self) -> Traced:
        """Make what computes losses and gradients where rows use the adapters that they use now."""
        if self._adapters not in self._traces:
            traced = mx.value_and_grad(self._loss)
            self._traces[self._adapters] = mx.compile(traced) if on_gpu() else traced
        return self._traces[self._adapters]

    def _blame(self, number: int, batches: Sequence[Batch]) -> NonFiniteError:
        """The error that names the first example which makes no finite loss or gradient alone."""
        hint = "The weights are those from before the step."
        fault = self.together.first(self._fault(number, batches))
        if not fault:
            return NonFiniteError(
                f"Step {number}: the loss or the gradient is not finite, though each example's is.",
                hint=f"Lower the learning rate. {hint}",
            )
        return NonFiniteError(
            f"Step {number}: {fault}.", hint=f"Look at that row, or lower the learning rate. {hint}"
        )

    def _fault(self, number: int, batches: Sequence[Batch]) -> str:
        everybody, self.together = self.together, self.together.apart
        try:
            for place, batch in enumerate(batches):
                for examples in self.units(batch):
                    alone = batch.alone(*examples)
                    values, found = self._gradients(alone, self.weight_of(alone), number, place)
                    mx.eval(values, found)
                    loss, norm = float(values[0]), self.together.norm(found)
                    for what, value in (("loss", loss), ("gradient", norm)):
                        if not math.isfinite(value):
                            return f"the {what} of {batch.sources[examples[0]]} is {value}"
            return ""
        finally:
            self.together = everybody
