"""One optimizer step: losses, gradients, their sum over micro-batches and machines, the update.

Knows a model with trainable parameters; knows nothing of data files, schedules or checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from phimlx.errors import TrainingError
from phimlx.models.phi3 import Phi3ForCausalLM
from phimlx.training.batches import Batch
from phimlx.training.forward import head_of, inputs_of, supervised_states
from phimlx.training.loss import linear_cross_entropy

Tree = dict[str, Any]


@dataclass(frozen=True)
class StepResult:
    """What one step did, over all machines."""

    loss: float  # mean over supervised tokens, before the update
    supervised_tokens: int
    real_tokens: int
    gradient_norm: float  # before clipping


class NonFiniteError(TrainingError):
    """A loss or a gradient that is no number; the weights are as they were before the step."""


class Step:
    """Trains what is not frozen in a model, a step at a time.

    The gradients are those of the mean loss over all supervised tokens of the step, however these
    are spread over micro-batches and machines.

    Args:
        clip: largest norm of all gradients together; None for none.
        checkpointing: trade time for memory; see `supervised_states`.
        seed: for dropout; a step draws the same numbers whenever it is run.
        group: the machines that share each step; None for this one alone.
    """

    def __init__(
        self,
        model: Phi3ForCausalLM,
        optimizer: optim.Optimizer,
        *,
        clip: float | None = None,
        checkpointing: bool = False,
        seed: int = 0,
        group: mx.distributed.Group | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip = clip
        self.checkpointing = checkpointing
        self.seed = seed
        self.group = group
        self._traced = mx.value_and_grad(self._loss)
        if mx.default_device().type == mx.DeviceType.gpu:
            self._traced = mx.compile(self._traced)

    def __call__(self, number: int, batches: Sequence[Batch]) -> StepResult:
        """Learn from the micro-batches of step `number`, this machine's part of each.

        Raises:
            NonFiniteError: naming the example; nothing has been updated.
        """
        counts = [sum(b.supervised_tokens for b in batches), sum(b.real_tokens for b in batches)]
        supervised, real = np.array(self._sum(mx.array(counts))).tolist()
        loss = mx.array(0.0)
        gradients: Tree = {}
        for place, batch in enumerate(batches):
            part, found = self._gradients(batch, supervised, number, place)
            loss = loss + part
            gradients = tree_map(mx.add, gradients, found) if gradients else found
            mx.eval(loss, gradients)
        gradients = tree_map(self._sum, gradients)
        mean, norm = float(self._sum(loss)), _norm(gradients)
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise self._blame(number, batches)
        if self.clip is not None and norm > self.clip:
            scale = self.clip / norm
            gradients = tree_map(lambda gradient: gradient * scale, gradients)
        self.optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        return StepResult(mean, supervised, real, norm)

    def _gradients(
        self, batch: Batch, supervised: int, number: int, place: int
    ) -> tuple[mx.array, Tree]:
        """One batch's part of the mean loss over `supervised` tokens, and its gradients."""
        weighted = replace(batch, weights=batch.weights / np.float32(supervised))
        rank = 0 if self.group is None else self.group.rank()
        entropy = np.random.SeedSequence([self.seed, number, place, rank])
        parameters = self.model.trainable_parameters()
        try:
            return self._traced(
                parameters,
                inputs_of(weighted, self.model.config.rope),
                mx.array(entropy.generate_state(2)),
            )
        finally:
            self.model.update(parameters)  # tracing put its own arrays in their place

    def _loss(self, parameters: Tree, inputs: dict[str, mx.array], key: mx.array) -> mx.array:
        self.model.update(parameters)
        states = supervised_states(self.model, inputs, key, self.checkpointing)
        head = head_of(self.model)
        return linear_cross_entropy(head, states, inputs["targets"], inputs["weights"])

    def _sum(self, array: mx.array) -> mx.array:
        """The sum over all machines."""
        return array if self.group is None else mx.distributed.all_sum(array, group=self.group)

    def _blame(self, number: int, batches: Sequence[Batch]) -> NonFiniteError:
        """The error that names the first example which makes no finite loss or gradient alone."""
        for place, batch in enumerate(batches):
            for example, source in enumerate(batch.sources):
                alone = batch.alone(example)
                if not alone.supervised_tokens:
                    continue
                loss, found = self._gradients(alone, alone.supervised_tokens, number, place)
                for what, value in (("loss", float(loss)), ("gradient", _norm(found))):
                    if not math.isfinite(value):
                        return NonFiniteError(
                            f"Step {number}: the {what} of {source} is {value}.",
                            hint="Look at that row, or lower the learning rate. The weights are "
                            "those from before the step.",
                        )
        return NonFiniteError(
            f"Step {number}: the loss or the gradient is not finite, though each example's is.",
            hint="Lower the learning rate. The weights are those from before the step.",
        )


def _norm(gradients: Tree) -> float:
    """The Euclidean norm of all gradients together."""
    arrays = dict(tree_flatten(gradients)).values()
    squares = [array.astype(mx.float32).square().sum() for array in arrays]
    return float(mx.sqrt(mx.stack(squares).sum()))
