"""Preferences against the paper's equation over all logits, pair by pair."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phimlx.models.phi3 import Phi3ForCausalLM
from phimlx.training.data.batches import Example
from phimlx.training.preference import PairBatches, PairStep
from phimlx.training.reference import without_adapter
from phimlx.training.settings import TrainSettings
from phimlx.training.trainable import attach
from tests.training.models import tiny
from tests.training.test_step import Recorder

BETA = 0.3


def pairs(count: int = 5) -> list[Example]:
    random = np.random.default_rng(2)
    examples = []
    for number in range(count):
        prompt = random.integers(0, 300, random.integers(3, 30))
        for name in ("better", "worse"):
            answer = random.integers(0, 300, random.integers(1, 30))
            tokens = np.concatenate([prompt, answer]).astype(np.int32)
            examples.append(
                Example(tokens, np.arange(len(tokens)) >= len(prompt), f"{number} {name}")
            )
    return examples


def adapted(kind: str = "lora") -> Phi3ForCausalLM:
    """A model whose adapter has moved away from its beginning."""
    model = tiny()
    attach(model, TrainSettings(fine_tune_type=kind, rank=4))
    mx.random.seed(5)
    moved = [
        (name, array + 0.02 * mx.random.normal(array.shape))
        for name, array in dict(tree_flatten(model.trainable_parameters())).items()
    ]
    model.load_weights(moved, strict=False)
    return model


def log_probability(model: Phi3ForCausalLM, example: Example) -> mx.array:
    logits = model(mx.array(example.tokens[None, :-1]))[0]
    losses = nn.losses.cross_entropy(logits, mx.array(example.tokens[1:]))
    return -(losses * mx.array(example.supervised[1:])).sum()


def plain(model: Phi3ForCausalLM, data: list[Example]) -> tuple[float, dict[str, mx.array], float]:
    with without_adapter(model):
        reference = [float(log_probability(model, each)) for each in data]

    def loss() -> tuple[mx.array, mx.array]:
        own = [log_probability(model, each) for each in data]
        margins = mx.stack(
            [
                BETA * ((own[i] - reference[i]) - (own[i + 1] - reference[i + 1]))
                for i in range(0, len(data), 2)
            ]
        )
        return -nn.log_sigmoid(margins).mean(), margins.mean()

    before = model.trainable_parameters()
    (value, margin), gradients = nn.value_and_grad(model, loss)()
    model.update(before)
    return float(value), dict(tree_flatten(gradients)), float(margin)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_loss_and_gradients_are_the_papers(kind: str, batch_size: int) -> None:
    model, data, recorder = adapted(kind), pairs(), Recorder()
    expected, gradients, margin = plain(model, data)
    step = PairStep(model, recorder, "dpo", {"beta": BETA})
    batches = list(PairBatches(data, batch_size, seed=1).epoch(0))
    result = step(1, batches)
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.metrics["margin"] == pytest.approx(margin, abs=1e-4)  # a difference of sums
    for name, gradient in gradients.items():
        scale = float(mx.abs(gradient).max())
        assert float(mx.abs(recorder.seen[name] - gradient).max()) <= 1e-5 * scale, name
    assert step.evaluate(batches).loss == pytest.approx(expected, rel=1e-5)


def test_before_the_first_step_nothing_is_preferred() -> None:
    model = tiny()
    attach(model, TrainSettings(rank=4))
    result = PairStep(model, Recorder(), "dpo", {"beta": BETA}).evaluate(
        PairBatches(pairs(), 3).epoch(0)
    )
    assert result.loss == pytest.approx(np.log(2), rel=1e-6)
    assert result.metrics == {"accuracy": 0, "margin": 0}


def test_the_better_answers_come_to_be_preferred() -> None:
    model = tiny()
    attach(model, TrainSettings(rank=4))
    step = PairStep(model, optim.AdamW(5e-3), "dpo", {"beta": BETA})
    batches = list(PairBatches(pairs(), 5).epoch(0))
    results = [step(number, batches) for number in range(1, 16)]
    assert results[-1].loss < results[0].loss / 4
    assert results[-1].metrics["accuracy"] == 1


def test_pairs_stay_together_and_come_once() -> None:
    data = pairs(11)
    for ranks in (1, 2):
        seen: list[str] = []
        for rank in range(ranks):
            for batch in PairBatches(data, 4, seed=0, rank=rank, ranks=ranks).epoch(2):
                halves = [source.split() for source in batch.sources]
                assert [half[0] for half in halves[::2]] == [half[0] for half in halves[1::2]]
                assert all(half[1] == "better" for half in halves[::2])
                seen += batch.sources
        assert sorted(seen) == sorted(each.source for each in data)
