"""Learning from judged answers: pairs of a better and a worse one, or single ones with a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from phimlx.models.base import CausalLM
from phimlx.training.data.batches import Batch, Batches, Example, Rows, lay_out, pack, rounded
from phimlx.training.forward import supervised_states
from phimlx.training.loss import measured_losses, token_losses
from phimlx.training.methods import METHODS
from phimlx.training.reference import Reference, evaluating
from phimlx.training.step import TrainingStep, Tree

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of answers, [answers].

    Attributes:
        logps: of each answer as a whole.
        lengths: tokens of each.
        before: `logps` of the model before training, of methods that have a reference.
    """

    logps: mx.array
    lengths: mx.array
    before: mx.array

    @property
    def means(self) -> mx.array:
        """Mean log-probability of a token."""
        return self.logps / self.lengths

    @property
    def gains(self) -> mx.array:
        """By how much training has raised each log-probability."""
        return self.logps - self.before


PairLoss = Callable[[Answers, Answers, Numbers], tuple[mx.array, ...]]
"""Takes better and worse answers; gives each pair's loss, its margin and what is told besides."""


def _dpo(better: Answers, worse: Answers, numbers: Numbers) -> tuple[mx.array, ...]:
    margin = numbers["beta"] * (better.gains - worse.gains)
    return -nn.log_sigmoid(margin), margin


def _orpo(better: Answers, worse: Answers, numbers: Numbers) -> tuple[mx.array, ...]:
    """The likelihood of an answer is the geometric mean of its tokens'."""
    ratio = _log_odds(better.means) - _log_odds(worse.means)
    nll = -better.means
    return nll - numbers["lambda_"] * nn.log_sigmoid(ratio), ratio, nll


def _simpo(better: Answers, worse: Answers, numbers: Numbers) -> tuple[mx.array, ...]:
    margin = numbers["beta"] * (better.means - worse.means)
    return -nn.log_sigmoid(margin - numbers["gamma"]), margin


def _cpo(better: Answers, worse: Answers, numbers: Numbers) -> tuple[mx.array, ...]:
    """Of the chosen answer's likelihood the mean over its tokens, as the authors' code has it."""
    margin = numbers["beta"] * (better.logps - worse.logps)
    nll = -better.means
    return numbers["lambda_"] * nll - nn.log_sigmoid(margin), margin, nll


PAIR_LOSSES: dict[str, PairLoss] = {"dpo": _dpo, "orpo": _orpo, "simpo": _simpo, "cpo": _cpo}
"""Sources are in `phimlx.training.methods`."""

CERTAIN = -1e-6  # of log p, above which float32 has no digits left of 1 − p


def _log_odds(logps: mx.array) -> mx.array:
    """log p / (1 − p)."""
    logps = mx.minimum(logps, CERTAIN)
    return logps - mx.log(-mx.expm1(logps))


class PairBatches(Batches):
    """Batches of pairs: the examples of a data set are a better and a worse one, in turn.

    `batch_size` counts pairs, or rows of the better ones of packed pairs; the worse ones are in a
    row below theirs.
    """

    @property
    def _units(self) -> range:
        return range(0, len(self.examples), 2)

    def _length(self, row: tuple[int, ...]) -> int:
        return super()._length(tuple(i + side for i in row for side in (0, 1)))

    def _mine(self, rows: Rows) -> Rows:
        return [tuple(i + side for i in row) for row in super()._mine(rows) for side in (0, 1)]

    def _shape(self, rows: Rows) -> tuple[int, int]:
        count, length = super()._shape(rows)
        return 2 * count, length


@dataclass(frozen=True)
class AnswerBatch(Batch):
    """Answers, beside them the same prompts with the answers of others."""

    mismatched: Batch

    def alone(self, *places: int) -> AnswerBatch:
        """Some of the examples in a batch of their own, a row each."""
        found = super().alone(*places)
        others = [self.examples[place] for place in (*places[1:], places[0])]
        return _beside(found, others, None)


class AnswerBatches(Batches):
    """Batches of single answers.

    Each prompt's other answer is that of the next shorter example in the batch, over all machines.
    """

    def _build(self, rows: Rows) -> Batch:
        batch = super()._build(rows)
        numbers = sorted((i for row in rows for i in row), key=lambda i: -self._length((i,)))
        following = dict(zip(numbers, [*numbers[1:], numbers[0]], strict=True))
        if len(numbers) == 1:
            following[numbers[0]] = (numbers[0] + 1) % len(self.examples)
        others = [self.examples[following[number]] for number in batch.numbers.tolist()]
        return _beside(batch, others, self.row_length, self._longest)

    @cached_property
    def _longest(self) -> int:
        return max(example.inputs for example in self.examples)


def _beside(
    batch: Batch, others: list[Example], row_length: int | None, longest: int | None = None
) -> AnswerBatch:
    """Put the answers of others beside a batch, of at most `longest` tokens with the prompt."""
    found = [_mismatch(*pair, longest) for pair in zip(batch.examples, others, strict=True)]
    lengths = [example.inputs for example in found]
    rows: Rows = [(place,) for place in range(len(found))]
    width = rounded(max(lengths, default=1), 8)
    if row_length is not None:
        order = sorted(range(len(found)), key=lambda i: -lengths[i])
        rows, width = pack([lengths[i] for i in order], row_length, order), row_length
    height = max(len(rows), batch.tokens.shape[0])
    mismatched = lay_out(found, rows, (height, width), row_length is not None)
    return AnswerBatch(**vars(batch), mismatched=mismatched)


def _mismatch(asked: Example, answered: Example, longest: int | None) -> Example:
    begin, end = (int(np.argmax(each.supervised)) for each in (asked, answered))
    tokens = np.concatenate([asked.tokens[:begin], answered.tokens[end:]])
    supervised = np.concatenate([np.zeros(begin, bool), answered.supervised[end:]])
    stop = None if longest is None else longest + 1
    return Example(tokens[:stop], supervised[:stop], asked.source)


class _JudgedStep(TrainingStep):
    """A step whose loss is a function of the log-probabilities of whole answers.

    Args:
        method: by its name; the model is as it was before training.
        numbers: of its loss. The rest as in `TrainingStep`.
    """

    def __init__(
        self, model: CausalLM, optimizer: Any, method: str, numbers: Numbers, **options: Any
    ) -> None:
        self.method = method
        self.numbers = numbers
        self.metrics = METHODS[method].metrics
        self.reference = Reference(model) if METHODS[method].has_reference else None
        super().__init__(model, optimizer, **options)

    def _slots(self, batch: Batch) -> tuple[np.ndarray, int]:
        """The place of each example's answer, and how many places there are."""
        count = len(batch.examples)
        size = batch.tokens.shape[0] if batch.segments is None else rounded(max(count, 1), 8)
        return np.arange(count), size

    def inputs(self, batch: Batch, weight: int) -> dict[str, mx.array]:
        inputs = super().inputs(batch, 1)
        slots, size = self._slots(batch)
        ids = slots[batch.example_ids] if len(slots) else np.zeros_like(batch.example_ids)
        inputs["answers"] = mx.array(ids.astype(np.int32))
        inputs["before"] = mx.zeros(size)  # which tells the loss how many places there are
        if self.reference is not None:
            with self.reference.used(), evaluating(self.model):
                inputs["before"] = self._logps(inputs).logps
                mx.eval(inputs["before"])
        return inputs

    def _logps(self, inputs: Mapping[str, mx.array], key: mx.array | None = None) -> Answers:
        """Those of the answers; nothing is learned from them where there is no key."""
        drawn = mx.random.key(0) if key is None else key
        checkpointing = self.checkpointing and key is not None
        states = supervised_states(self.model, inputs, drawn, checkpointing, self._adapters)
        losses_of = measured_losses if key is None else token_losses
        losses = losses_of(self.model.output_layer, states, inputs["targets"])
        nothing = mx.zeros(inputs["before"].shape[0])
        return Answers(
            nothing.at[inputs["answers"]].add(-losses * inputs["weights"]),
            mx.maximum(nothing.at[inputs["answers"]].add(inputs["weights"]), 1),
            inputs["before"],
        )


class PairStep(_JudgedStep):
    """Raises a better answer's probability over a worse one's; the mean is over pairs."""

    def weight_of(self, batch: Batch) -> int:
        return len(batch.examples) // 2

    def units(self, batch: Batch) -> list[tuple[int, ...]]:
        places: dict[int, list[int]] = {}
        for place, number in enumerate(batch.numbers.tolist()):
            places.setdefault(number // 2, []).append(place)
        return [tuple(each) for each in places.values()]

    def _slots(self, batch: Batch) -> tuple[np.ndarray, int]:
        _, pairs = np.unique(batch.numbers // 2, return_inverse=True)
        return 2 * pairs + batch.numbers % 2, super()._slots(batch)[1]

    def inputs(self, batch: Batch, weight: int) -> dict[str, mx.array]:
        inputs = super().inputs(batch, weight)
        # A machine may have rows without a pair in them.
        real = np.arange(inputs["before"].shape[0] // 2) < self.weight_of(batch)
        inputs["share"] = mx.array(real / np.float32(weight), mx.float32)
        return inputs

    def _loss(
        self, parameters: Tree, inputs: Mapping[str, mx.array], key: mx.array, learning: bool = True
    ) -> tuple[mx.array, ...]:
        self.model.update(parameters)
        found = self._logps(inputs, key if learning else None)
        better, worse = (
            Answers(found.logps[side::2], found.lengths[side::2], found.before[side::2])
            for side in (0, 1)
        )
        loss, margin, *more = PAIR_LOSSES[self.method](better, worse, self.numbers)
        told = (loss, margin > 0, margin, *more)
        return tuple((each * inputs["share"]).sum() for each in told)


class AnswerStep(_JudgedStep):
    """Raises the probability of good answers and lowers that of bad ones, as people feel gains
    and losses: against a point of reference, the KL divergence from the model before training.

    It is estimated over the prompts of a batch with answers of other prompts, and not learned from.
    """

    def weight_of(self, batch: Batch) -> int:
        return len(batch.examples)

    def inputs(self, batch: Batch, weight: int) -> dict[str, mx.array]:
        assert isinstance(batch, AnswerBatch)
        inputs = super().inputs(batch, weight)
        count, size = len(batch.examples), inputs["before"].shape[0]
        with evaluating(self.model):
            others = super().inputs(batch.mismatched, weight)
            gains = self._logps(others).gains[: max(count, 1)].sum() if count else mx.array(0.0)
        total, everybody = self.together.totals(mx.stack([gains, mx.array(float(count))]))
        inputs["kl"] = mx.array(max(0.0, total / max(everybody, 1)))
        good = np.array([example.desirable for example in batch.examples], bool)
        names = ("undesirable_weight", "desirable_weight")
        values = np.zeros(size, np.float32)
        values[:count] = np.where(good, *(self.numbers[name] for name in names[::-1]))
        inputs["value"] = mx.array(values)
        inputs["sign"] = mx.array(np.pad(np.where(good, 1, -1), (0, size - count)), mx.float32)
        inputs["share"] = mx.array((np.arange(size) < count) / np.float32(weight), mx.float32)
        return inputs

    def _loss(
        self, parameters: Tree, inputs: Mapping[str, mx.array], key: mx.array, learning: bool = True
    ) -> tuple[mx.array, ...]:
        self.model.update(parameters)
        gains = self._logps(inputs, key if learning else None).gains
        margin = self.numbers["beta"] * (gains - inputs["kl"]) * inputs["sign"]
        loss = inputs["value"] * (1 - mx.sigmoid(margin))
        told = (loss, margin > 0, margin, inputs["kl"])
        return tuple((each * inputs["share"]).sum() for each in told)


STEPS: dict[str, type[_JudgedStep]] = {"pairs": PairStep, "answers": AnswerStep}
BATCHES: dict[str, type[Batches]] = {"pairs": PairBatches, "answers": AnswerBatches}
"""By the rows that a method takes."""
