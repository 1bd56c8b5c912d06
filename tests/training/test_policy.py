"""GRPO: its loss against torch's, the engine's log-probabilities, and what follows from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phimlx.hub.resolve import NANO
from phimlx.models.phi3 import Phi3ForCausalLM
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from phimlx.training.data.batches import Batch, Batches, Example, Task
from phimlx.training.forward import inputs_of, supervised_states
from phimlx.training.loss import measured_losses
from phimlx.training.policy import Answering, PolicyStep, Rollout
from phimlx.training.rewards import Answered
from phimlx.training.settings import TrainSettings
from phimlx.training.trainable import attach
from tests.training.models import tiny
from tests.training.test_methods import LENGTHS, SEED, check, data, goldens, move, prepared
from tests.training.test_step import Recorder

TOKENIZER = Tokenizer.load(NANO)
NUMBERS = {"beta": 0.3, "epsilon": 0.2}
STOP = 7


def answering(**options: Any) -> Answering:
    """Rewards an answer for each even token."""

    def even(answers: Sequence[Answered]) -> list[float]:
        return [float(len(each.text) % 5) for each in answers]

    settings: dict[str, Any] = {"group_size": 4, "max_tokens": 9, "rewards": [even]}
    return Answering(TOKENIZER, frozenset({STOP}), **{**settings, **options})


def prompts(count: int = 3) -> list[Example]:
    random = np.random.default_rng(8)
    found = []
    for number in range(count):
        tokens = random.integers(10, 300, 4 + 3 * number).astype(np.int32)
        task = Task("?", None, {})
        found.append(Example(tokens, np.zeros(len(tokens), bool), f"row {number}", task=task))
    return found


def batch(examples: Sequence[Example]) -> Batch:
    return next(Batches(examples, len(examples)).epoch(0))


def adapted() -> Phi3ForCausalLM:
    """A model whose adapter has moved away from its beginning, not beyond its LongRoPE step."""
    model = tiny()
    attach(model, TrainSettings(rank=4))
    mx.random.seed(5)
    trained: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    moved = [(name, a + 0.1 * mx.random.normal(a.shape)) for name, a in trained.items()]
    model.load_weights(moved, strict=False)
    return model


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_loss_and_gradients_are_the_papers(kind: str) -> None:
    expected, gradients = goldens("grpo", kind)
    model, recorder = prepared(kind), Recorder()
    step = PolicyStep(model, recorder, NUMBERS, answering(group_size=3))
    move(model, kind)
    random = np.random.default_rng(SEED + 3)
    advantages = random.standard_normal(len(LENGTHS)).astype(np.float32)
    drifts = [random.normal(0, 0.3, n).astype(np.float32) for _, n in LENGTHS]
    rollouts = [
        Rollout(example, logps(model, example) + drift, 0.0, float(advantage), 0.0)
        for example, advantage, drift in zip(data(), advantages, drifts, strict=True)
    ]
    result = super(PolicyStep, step).__call__(1, step.divide(rollouts))
    assert result.loss == pytest.approx(expected["loss"], rel=1e-5)
    assert result.metrics["kl"] == pytest.approx(expected["kl"], rel=1e-5)
    assert result.metrics["length"] == pytest.approx(np.mean([n for _, n in LENGTHS]))
    assert 0 < result.metrics["clipped"] < 1
    check(recorder, gradients)


def logps(model: Phi3ForCausalLM, example: Example) -> np.ndarray:
    """Log-probabilities of an answer's tokens, by the trainer."""
    inputs = inputs_of(batch([example]), model.config.rope)
    states = supervised_states(model, inputs, mx.random.key(0))
    found = measured_losses(model.output_layer, states, inputs["targets"])
    return -np.array(found)[: int(example.supervised.sum())]


def test_the_engine_draws_with_the_adapter_live_and_scores_as_the_trainer_does() -> None:
    model = adapted()
    rollouts = answering().draw(model, batch(prompts()), 1)
    assert len(rollouts) == 12
    for each in rollouts:
        answer = each.example.tokens[each.example.supervised]
        assert len(answer) == len(each.logps) <= 9
        assert STOP not in answer[:-1]
        assert np.abs(logps(model, each.example) - each.logps).max() < 2e-5
    plain = tiny()
    assert max(np.abs(logps(plain, e.example) - e.logps).max() for e in rollouts) > 1e-2
    step = PolicyStep(model, Recorder(), NUMBERS, answering())
    result = super(PolicyStep, step).__call__(1, step.divide(rollouts))
    assert result.metrics["clipped"] == 0
    advantages = [each.advantage for each in rollouts]
    assert np.reshape(advantages, (-1, 4)).mean(axis=1) == pytest.approx(0, abs=1e-6)


def test_answers_follow_from_seed_step_and_prompt_alone() -> None:
    model, examples = adapted(), prompts()

    def drawn(step: int, *, seed: int = 0, of: Sequence[Example] = examples) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for each in answering(seed=seed).draw(model, batch(of), step):
            found.setdefault(each.example.source, []).append(each.example.tokens.tolist())
        return found

    first = drawn(1)
    assert drawn(1) == first
    assert drawn(2) != first
    assert drawn(1, seed=1) != first
    assert len({tuple(answer) for answers in first.values() for answer in answers}) == 12


def test_answers_that_are_rewarded_become_likelier() -> None:
    """A group's better answers rise over its worse ones, also in several updates of a step."""
    import mlx.optimizers as optim

    for updates in (1, 3):
        model = adapted()
        step = PolicyStep(model, optim.AdamW(3e-3), NUMBERS, answering(), updates)
        rollouts = answering().draw(model, batch(prompts()), 1)
        before = {id(each): logps(model, each.example).mean() for each in rollouts}
        step(1, [batch(prompts())])
        gained = [logps(model, each.example).mean() - before[id(each)] for each in rollouts]
        assert np.dot(gained, [each.advantage for each in rollouts]) > 0


def test_without_a_divergence_nothing_from_before_is_needed() -> None:
    step = PolicyStep(adapted(), Recorder(), {"beta": 0.0, "epsilon": 0.2}, answering())
    result = step(1, [batch(prompts())])
    assert step.reference is None
    assert result.metrics["kl"] == 0
    assert set(result.metrics) == {"reward", "reward_std", "length", "kl", "clipped"}


def test_a_machine_without_prompts_takes_part() -> None:
    step = PolicyStep(adapted(), Recorder(), NUMBERS, answering())
    (micro,) = step.divide([])
    assert step.weight_of(micro) == 0
    values, _ = step._gradients(micro, 4, 1, 0)
    assert [float(value) for value in values] == [0] * 6


def test_validation_is_the_reward_of_the_likeliest_answers() -> None:
    model = adapted()
    step = PolicyStep(model, Recorder(), NUMBERS, answering())
    result = step.evaluate([batch(prompts(2)), batch(prompts(3)[2:])])
    rewards = [each.reward for each in answering().draw_greedily(model, batch(prompts(3)))]
    assert result.metrics["reward"] == pytest.approx(np.mean(rewards))
    assert result.loss == -result.metrics["reward"]
