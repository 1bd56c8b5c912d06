"""Events of a training run, for whoever shows or keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from phimlx.training.step import StepResult


@dataclass(frozen=True)
class TrainingReport:
    """Some steps of training.

    Attributes:
        loss: mean over what was learned from since the report before.
        metrics: further means, beside the kind of loss.
        gradient_norm: the largest of a step, before clipping.
        learning_rate: of the last step.
        tokens_per_second: of real tokens; padding does not count.
        peak_memory: bytes, since the run began.
        seconds: since the run began, what was before a resume included.
        left: seconds until the end, at the speed of this report.
    """

    step: int
    epoch: float
    loss: float
    metrics: Mapping[str, float]
    gradient_norm: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    peak_memory: int
    seconds: float
    left: float


@dataclass(frozen=True)
class Validation:
    """The loss on what is not learned from, and whether it is the lowest so far."""

    step: int
    loss: float
    metrics: Mapping[str, float]
    tokens: int
    best: bool
    seconds: float


@dataclass(frozen=True)
class SampleReply:
    """The model's reply to a prompt of the validation data, and what stands there."""

    step: int
    source: str
    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was written."""

    step: int
    best: bool


@dataclass(frozen=True)
class CheckpointSkipped:
    """A checkpoint that is not whole was left out when the run was taken up again."""

    step: int
    reason: str


@dataclass(frozen=True)
class StepTaken:
    """A step was taken."""

    step: int
    result: StepResult


Event = TrainingReport | Validation | SampleReply | CheckpointSaved | CheckpointSkipped | StepTaken
