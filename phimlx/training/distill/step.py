"""Steps of a student towards a teacher whose probabilities are on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from phimlx.machine.reductions import long_sum
from phimlx.training.data.batches import Batch
from phimlx.training.distill.divergence import Divergence
from phimlx.training.distill.logits_file import TeacherLogits, positions_of
from phimlx.training.forward import supervised_states
from phimlx.training.loss import linear_loss, measured_values
from phimlx.training.step import TrainingStep, Tree


class DistillationStep(TrainingStep):
    """Brings a student's probabilities to the teacher's, where something is to be learned.

    Args:
        divergence: the loss.
        teacher: the teacher's probabilities along all examples. The rest as in `TrainingStep`.
    """

    metrics = ("divergence", "cross-entropy")

    def __init__(
        self, *arguments: Any, divergence: Divergence, teacher: TeacherLogits, **options: Any
    ) -> None:
        self.divergence = divergence
        self.teacher = teacher
        super().__init__(*arguments, **options)

    def inputs(self, batch: Batch, weight: int) -> dict[str, mx.array]:
        rows = np.zeros(len(batch.targets), np.int64)  # the first position's stand for padding
        learned = [
            self.teacher.place(example) + np.arange(positions_of(example))
            for example in batch.examples
        ]
        rows[: sum(map(len, learned))] = np.concatenate(learned)
        tokens, logs = self.teacher.read(rows)
        inputs = super().inputs(batch, weight)
        return inputs | {"teacher_tokens": mx.array(tokens), "teacher_logs": mx.array(logs)}

    def _loss(
        self, parameters: Tree, inputs: Mapping[str, mx.array], key: mx.array, learning: bool = True
    ) -> tuple[mx.array, ...]:
        self.model.update(parameters)
        states = supervised_states(self.model, inputs, key, self.checkpointing, self._adapters)
        criterion = self.divergence.criterion(
            inputs["targets"], inputs["teacher_tokens"], inputs["teacher_logs"]
        )
        head, weights = self.model.output_layer, inputs["weights"]
        if learning:
            return tuple(linear_loss(head, states, criterion, weights))
        found = measured_values(head, states, criterion)
        return tuple(long_sum(values * weights) for values in found)
