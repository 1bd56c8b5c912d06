"""Learning rates against the formulas that they are named after, and every optimizer at work."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import pytest

from phimlx.training.schedule import OPTIMIZERS, learning_rate, make_optimizer, warmup_steps
from phimlx.training.settings import TrainSettings


def rates(settings: TrainSettings, steps: int) -> list[float]:
    schedule = learning_rate(settings, steps)
    return [float(schedule(mx.array(step, mx.uint64))) for step in range(steps)]


def test_cosine_after_a_straight_warmup() -> None:
    found = rates(TrainSettings(learning_rate=1.0, warmup=4), 24)
    expected = [(step + 1) / 5 for step in range(4)] + [
        0.1 + 0.9 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)
    ]
    assert found == pytest.approx(expected, rel=1e-6)


def test_linear_and_constant() -> None:
    linear = rates(TrainSettings(learning_rate=1.0, warmup=0, lr_schedule="linear"), 9)
    assert linear == pytest.approx([1 - 0.1 * step for step in range(9)], rel=1e-6)
    constant = rates(TrainSettings(learning_rate=0.5, warmup=1, lr_schedule="constant"), 4)
    assert constant == pytest.approx([0.25, 0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"), [(None, 1000, 30), (None, 9999, 100), (None, 10, 0), (7, 5, 4)]
)
def test_warmup_is_a_part_of_the_run(warmup: int | None, steps: int, expected: int) -> None:
    assert warmup_steps(TrainSettings(warmup=warmup), steps) == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_downhill(name: str) -> None:
    mx.random.seed(0)
    layer = nn.Linear(8, 8)
    x = mx.random.normal((32, 8))

    def loss(model: nn.Module) -> mx.array:
        return mx.square(model(x) - x).mean()

    optimizer = make_optimizer(TrainSettings(optimizer=name, learning_rate=0.01), 20)
    before = float(loss(layer))
    for _ in range(20):
        _, gradients = nn.value_and_grad(layer, loss)(layer)
        optimizer.update(layer, gradients)
    assert float(loss(layer)) < before
