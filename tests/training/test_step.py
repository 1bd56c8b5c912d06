"""One step against the plain computation: each example alone, all logits, MLX's cross-entropy."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from phimlx.models.phi3 import Phi3ForCausalLM
from phimlx.training.data.batches import Batches, Example
from phimlx.training.step import NonFiniteError, TrainingStep
from phimlx.training.together import Alone
from tests.training.models import tiny

LENGTHS = (5, 20, 31, 32, 33, 60, 12, 47)  # on both sides of the LongRoPE step at 32


def examples(lengths: Sequence[int] = LENGTHS) -> list[Example]:
    random = np.random.default_rng(4)
    return [
        Example(
            random.integers(0, 300, length + 1).astype(np.int32),
            random.random(length + 1) < 0.6,
            f"train.jsonl, line {line}",
        )
        for line, length in enumerate(lengths, 1)
    ]


def plain(model: Phi3ForCausalLM, data: Sequence[Example]) -> tuple[float, dict[str, mx.array]]:
    """Mean loss and gradients, one example at a time through the model's own call."""
    total = sum(int(each.supervised[1:].sum()) for each in data)

    def loss() -> mx.array:
        summed = mx.array(0.0)
        for each in data:
            logits = model(mx.array(each.tokens[None, :-1]))[0]
            losses = nn.losses.cross_entropy(logits, mx.array(each.tokens[1:]))
            summed = summed + (losses * mx.array(each.supervised[1:])).sum()
        return summed / total

    before = model.trainable_parameters()
    value, gradients = nn.value_and_grad(model, loss)()
    model.update(before)
    return float(value), dict(tree_flatten(gradients))


class Recorder(optim.SGD):
    """Keeps the gradients that a step found, and updates nothing."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0)
        self.seen: dict[str, mx.array] = {}

    def update(self, model: nn.Module, gradients: Any) -> None:
        self.seen = dict(tree_flatten(gradients))


WAYS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"row_length": 64},
    "checkpointed": {"checkpointing": True},
    "packed, checkpointed": {"row_length": 64, "checkpointing": True},
    "accumulated": {"batch_size": 3},
    "packed, accumulated": {"row_length": 96, "batch_size": 1},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_those_of_each_example_alone(way: str, tied: bool) -> None:
    options = {"batch_size": 8, **WAYS[way]}
    checkpointing = options.pop("checkpointing", False)
    model, data, recorder = tiny(tied), examples(), Recorder()
    expected, gradients = plain(model, data)
    batches = list(Batches(data, seed=0, **options).epoch(0))
    result = TrainingStep(model, recorder, checkpointing=checkpointing)(1, batches)
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.supervised_tokens == sum(int(each.supervised[1:].sum()) for each in data)
    assert result.real_tokens == sum(LENGTHS)
    assert recorder.seen.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = float(mx.abs(gradient).max())
        assert float(mx.abs(recorder.seen[name] - gradient).max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("options", [{}, {"row_length": 64}])
def test_evaluating_finds_the_mean_over_all_batches(options: dict[str, Any]) -> None:
    model, data = tiny(), examples()
    expected, _ = plain(model, data)
    result = TrainingStep(model, Recorder()).evaluate(Batches(data, 3, **options).epoch(0))
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.supervised_tokens == sum(int(each.supervised[1:].sum()) for each in data)


def test_clipping_scales_all_gradients_together() -> None:
    model, recorder = tiny(), Recorder()
    result = TrainingStep(model, recorder, clip=0.01)(1, list(Batches(examples(), 8).epoch(0)))
    norm = mx.sqrt(sum(mx.square(g).sum() for g in recorder.seen.values()))
    assert result.gradient_norm > 0.01
    assert float(norm) == pytest.approx(0.01, rel=1e-5)


def test_the_norm_of_a_hundred_million_numbers() -> None:
    part = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    gradient = mx.tile(mx.array(part), 100).reshape(1000, -1)
    assert Alone().norm({"a": gradient}) == pytest.approx(
        10 * np.linalg.norm(part.astype(float)), 1e-6
    )


def test_a_step_learns() -> None:
    model = tiny()
    step = TrainingStep(model, optim.AdamW(1e-3))
    batches = list(Batches(examples(), 8).epoch(0))
    losses = [step(number, batches).loss for number in range(1, 31)]
    assert losses[-1] < losses[0] / 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling for the CPU takes a compiler")
def test_a_compiled_step_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorder = tiny(), Recorder()
    batches = list(Batches(examples(), 8).epoch(0))
    step = TrainingStep(model, recorder)
    plain_loss = step(1, batches).loss
    gradients = recorder.seen
    monkeypatch.setattr("phimlx.training.step.on_gpu", lambda: True)
    step = TrainingStep(model, recorder)
    for _ in range(2):
        assert step(1, batches).loss == pytest.approx(plain_loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert mx.allclose(recorder.seen[name], gradient, rtol=1e-4, atol=1e-6), name


def test_the_example_that_makes_no_finite_loss_is_named_and_nothing_is_harmed() -> None:
    model, data = tiny(tied=False), examples()
    poisoned = 299
    for each in data:
        each.tokens[each.tokens == poisoned] = 0
    data[3].tokens[2] = poisoned
    data[3].supervised[:] = True
    weight = np.array(model.model.embed_tokens.weight)
    weight[poisoned] = np.inf
    model.model.embed_tokens.weight = mx.array(weight)
    optimizer = optim.AdamW(1e-3)
    before = tree_map(np.array, model.parameters())
    with pytest.raises(NonFiniteError) as error:
        TrainingStep(model, optimizer)(7, list(Batches(data, 4).epoch(0)))
    assert str(error.value) == "Step 7: the loss of train.jsonl, line 4 is nan."
    assert error.value.hint == (
        "Look at that row, or lower the learning rate. The weights are those from before the step."
    )
    after = tree_map(np.array, model.parameters())
    for (name, was), (_, now) in zip(tree_flatten(before), tree_flatten(after), strict=True):
        assert (was == now).all(), name
