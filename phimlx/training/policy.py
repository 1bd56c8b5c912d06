"""Learning from the model's own answers to prompts, by what rewards say of them (GRPO)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from phimlx.generation.engine import Engine
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.models.base import CausalLM
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from phimlx.training.data.batches import Batch, Example, lay_out, rounded
from phimlx.training.forward import supervised_states
from phimlx.training.loss import measured_losses, token_losses
from phimlx.training.methods import METHODS
from phimlx.training.reference import Reference, evaluating
from phimlx.training.rewards import Answered, Reward
from phimlx.training.step import StepResult, TrainingStep, Tree

AT_ONCE = 64  # answers that are decoded together
FLAT = 1e-6  # added to the spread of a group's rewards, which may be none

Advance = Callable[[int, int], object]
"""Takes the answers that are complete, and how many there will be."""


@dataclass(frozen=True)
class Rollout:
    """An answer of the model's own.

    Attributes:
        example: prompt and answer, the latter to be learned from.
        logps: log-probabilities of its tokens where it was drawn, float32 `[answer]`.
        advantage: of its reward over its group's mean, in standard deviations of the group.
        deviation: that standard deviation.
    """

    example: Example
    logps: np.ndarray
    reward: float
    advantage: float
    deviation: float


@dataclass(frozen=True)
class Answering:
    """How prompts are answered and judged.

    Attributes:
        stop_tokens: that end an answer.
        rewards: which add up.
        group_size: answers to each prompt.
        max_tokens: of an answer.
        seed: an answer follows from it, the step, its prompt and its place in the group.
        advance: told how far a step's answers have come.
    """

    tokenizer: Tokenizer
    stop_tokens: frozenset[int]
    rewards: Sequence[Reward]
    group_size: int
    max_tokens: int
    seed: int = 0
    advance: Advance = lambda done, total: None

    def draw(self, model: CausalLM, batch: Batch, step: int) -> list[Rollout]:
        """Answer each prompt of a batch several times, at temperature 1."""
        requests = [
            self._request(example, Sampling(temperature=1.0), self._seed(step, number, place))
            for example, number in zip(batch.examples, batch.numbers.tolist(), strict=True)
            for place in range(self.group_size)
        ]
        examples = [each for each in batch.examples for _ in range(self.group_size)]
        return self._judged(model, examples, requests, self.group_size)

    def draw_greedily(self, model: CausalLM, batch: Batch) -> list[Rollout]:
        """Answer each prompt once, with the likeliest tokens."""
        requests = [self._request(example, Sampling(), 0) for example in batch.examples]
        return self._judged(model, batch.examples, requests, 1)

    def _seed(self, step: int, number: int, place: int) -> int:
        sequence = np.random.SeedSequence([self.seed, step, number, place])
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _request(self, example: Example, sampling: Sampling, seed: int) -> Request:
        sampler = Sampler(sampling, seed)
        prompt = example.tokens.tolist()
        return Request(
            prompt, sampler, self.max_tokens, self.stop_tokens, prompt_lookup=False, top_logprobs=0
        )

    def _judged(
        self,
        model: CausalLM,
        examples: Sequence[Example],
        requests: Sequence[Request],
        group_size: int,
    ) -> list[Rollout]:
        if not requests:
            return []
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.advance(done, len(requests))

        Engine(model).run_all(requests, min(AT_ONCE, len(requests)), advance)
        gc.collect()  # engines refer to themselves, and hold keys and values as long as they are
        answers = [
            self._answered(example, request)
            for example, request in zip(examples, requests, strict=True)
        ]
        rewards = np.sum([reward(answers) for reward in self.rewards], axis=0)
        groups = rewards.reshape(-1, group_size)
        spread = groups.std(axis=1, keepdims=True)
        advantages = (groups - groups.mean(axis=1, keepdims=True)) / (spread + FLAT)
        deviations = np.broadcast_to(spread, groups.shape)
        return [
            _rollout(*each)
            for each in zip(
                examples,
                requests,
                rewards.tolist(),
                advantages.ravel().tolist(),
                deviations.ravel().tolist(),
                strict=True,
            )
        ]

    def _answered(self, example: Example, request: Request) -> Answered:
        assert example.task is not None
        tokens = request.reply.tokens
        text = self.tokenizer.decode([each for each in tokens if each not in self.stop_tokens])
        return Answered(example.task, text, len(tokens))


def _rollout(
    example: Example, request: Request, reward: float, advantage: float, deviation: float
) -> Rollout:
    tokens = np.array(request.tokens, np.int32)
    answered = replace(
        example, tokens=tokens, supervised=np.arange(len(tokens)) >= len(request.prompt)
    )
    logps = np.array([each.logprob for each in request.reply.logprobs], np.float32)
    return Rollout(answered, logps, reward, advantage, deviation)


@dataclass(frozen=True)
class RolloutBatch(Batch):
    """Answers to learn from."""

    rollouts: tuple[Rollout, ...]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], height: int) -> RolloutBatch:
        """Make a batch of so many rows."""
        examples = [each.example for each in rollouts]
        longest = max((example.inputs for example in examples), default=1)
        rows = [(place,) for place in range(len(examples))]
        batch = lay_out(examples, rows, (height, rounded(longest, 8)))
        return cls(**vars(batch), rollouts=tuple(rollouts))

    def alone(self, *places: int) -> RolloutBatch:
        """Some of the answers in a batch of their own, a row each."""
        return self.of([self.rollouts[place] for place in places], len(places))


class PolicyStep(TrainingStep):
    """Answers the prompts of a step, and raises the probability of answers that are better than
    the others of their group, with a bound on how far each token's moves.

    The loss is a mean over answers, of each the mean over its tokens. What drew the answers is the
    engine with the adapter as it is; its log-probabilities are those that tokens move from.

    Args:
        numbers: beta, of the divergence from the model before training, and epsilon, the bound.
        updates: how often the answers of a step are learned from. The rest as in `TrainingStep`.
    """

    metrics = METHODS["grpo"].metrics

    def __init__(
        self,
        model: CausalLM,
        optimizer: Any,
        numbers: Mapping[str, float],
        answering: Answering,
        updates: int = 1,
        **options: Any,
    ) -> None:
        self.beta, self.epsilon = numbers["beta"], numbers["epsilon"]
        self.answering = answering
        self.updates = updates
        self.reference = Reference(model) if self.beta else None
        super().__init__(model, optimizer, **options)

    def __call__(self, number: int, batches: Sequence[Batch]) -> StepResult:
        with evaluating(self.model):
            rollouts = [
                rollout
                for batch in batches
                for rollout in self.answering.draw(self.model, batch, number)
            ]
        micro = self.divide(rollouts)
        for _ in range(self.updates):
            result = super().__call__(number, micro)
        return result

    def divide(self, rollouts: Sequence[Rollout]) -> list[RolloutBatch]:
        """Make batches of as many answers as a group has, of about equal length; one at least."""
        size = self.answering.group_size
        longest_first = sorted(rollouts, key=lambda each: -each.example.inputs)
        starts = range(0, max(1, len(rollouts)), size)
        return [RolloutBatch.of(longest_first[start : start + size], size) for start in starts]

    def evaluate(self, batches: Iterable[Batch]) -> StepResult:
        """The mean reward of the likeliest answers, whose negative stands for a loss."""
        totals = np.zeros(3)
        with evaluating(self.model):
            for batch in batches:
                for each in self.answering.draw_greedily(self.model, batch):
                    totals += [1, each.reward, len(each.logps)]
        count, reward, length = self.together.totals(mx.array(totals.astype(np.float32)))
        told = {"reward": reward / max(count, 1), "length": length / max(count, 1)}
        return StepResult(-told["reward"], int(count), int(length), int(length), 0.0, told)

    def weight_of(self, batch: Batch) -> int:
        return len(batch.examples)

    def inputs(self, batch: Batch, weight: int) -> dict[str, mx.array]:
        assert isinstance(batch, RolloutBatch)
        inputs = super().inputs(batch, 1)
        size, count = len(batch.targets), batch.supervised_tokens
        lengths = np.array([len(each.logps) for each in batch.rollouts], np.int64)

        def by_token(values: Sequence[float] | np.ndarray) -> mx.array:
            spread = np.repeat(np.asarray(values, np.float32), lengths)
            return mx.array(np.pad(spread, (0, size - count)))

        drawn = [each.logps for each in batch.rollouts] or [np.zeros(0, np.float32)]
        inputs["drawn"] = mx.array(np.pad(np.concatenate(drawn), (0, size - count)))
        inputs["advantage"] = by_token([each.advantage for each in batch.rollouts])
        inputs["share"] = by_token(1 / (np.maximum(lengths, 1) * np.float64(weight)))
        told = [(each.reward, each.deviation, len(each.logps)) for each in batch.rollouts]
        inputs["told"] = mx.array(np.sum(told or [(0, 0, 0)], axis=0) / weight, mx.float32)
        inputs["before"] = mx.zeros(size)
        if self.reference is not None:
            with self.reference.used(), evaluating(self.model):
                inputs["before"] = self._logps(inputs)
                mx.eval(inputs["before"])
        return inputs

    def _logps(self, inputs: Mapping[str, mx.array], key: mx.array | None = None) -> mx.array:
        """Those of each token; nothing is learned from them where there is no key."""
        drawn = mx.random.key(0) if key is None else key
        checkpointing = self.checkpointing and key is not None
        states = supervised_states(self.model, inputs, drawn, checkpointing)
        losses_of = measured_losses if key is None else token_losses
        return -losses_of(self.model.output_layer, states, inputs["targets"])

    def _loss(
        self, parameters: Tree, inputs: Mapping[str, mx.array], key: mx.array, learning: bool = True
    ) -> tuple[mx.array, ...]:
        self.model.update(parameters)
        logps = self._logps(inputs, key if learning else None) * inputs["weights"]
        ratio = mx.exp(logps - inputs["drawn"])
        bounded = mx.clip(ratio, 1 - self.epsilon, 1 + self.epsilon)
        gain = mx.minimum(ratio * inputs["advantage"], bounded * inputs["advantage"])
        clipped = gain < ratio * inputs["advantage"]
        divergence = mx.zeros_like(gain)
        if self.reference is not None:
            away = (inputs["before"] - logps) * inputs["weights"]
            divergence = mx.exp(away) - away - 1
        share = inputs["share"]
        reward, deviation, length = inputs["told"]
        loss = ((self.beta * divergence - gain) * share).sum()
        return loss, reward, deviation, length, (divergence * share).sum(), (clipped * share).sum()
