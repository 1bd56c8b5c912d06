"""Optimizers and learning rates by name, from MLX."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from phimlx.training.settings import TrainSettings

Rate = Callable[[mx.array], mx.array]

LOWEST = 0.1  # where a falling rate ends, as a part of its highest
WARMUP_SHARE, WARMUP_STEPS = 0.03, 100

SCHEDULES: dict[str, Callable[[float, int], Rate]] = {
    "cosine": lambda rate, steps: optim.cosine_decay(rate, steps, LOWEST * rate),
    "linear": lambda rate, steps: optim.linear_schedule(rate, LOWEST * rate, steps),
    "constant": lambda rate, steps: optim.linear_schedule(rate, rate, steps),
}

# Those of MLX's optimizers that decay weights take the settings' rate of it.
OPTIMIZERS: dict[str, Callable[[Rate, float], optim.Optimizer]] = {
    "adamw": lambda rate, decay: optim.AdamW(rate, weight_decay=decay),
    "adam": lambda rate, decay: optim.Adam(rate),
    "adafactor": lambda rate, decay: optim.Adafactor(
        rate, relative_step=False, scale_parameter=False, weight_decay=decay
    ),
    "lion": lambda rate, decay: optim.Lion(rate, weight_decay=decay),
    "muon": lambda rate, decay: optim.Muon(rate, weight_decay=decay),
    "sgd": lambda rate, decay: optim.SGD(rate, momentum=0.9, weight_decay=decay),
}


def warmup_steps(settings: TrainSettings, steps: int) -> int:
    """Steps in which the rate rises, fewer than all."""
    usual = min(WARMUP_STEPS, round(WARMUP_SHARE * steps))
    return min(usual if settings.warmup is None else settings.warmup, steps - 1)


def learning_rate(settings: TrainSettings, steps: int) -> Rate:
    """The rate at each step of a run of `steps`, the first of which is number 0.

    It rises in a straight line, reaches its highest when the warmup is over, and then falls.
    """
    warmup = warmup_steps(settings, steps)
    falling = SCHEDULES[settings.lr_schedule](settings.peak_learning_rate, max(1, steps - warmup))
    if not warmup:
        return falling
    rising = optim.linear_schedule(
        settings.peak_learning_rate / (warmup + 1), settings.peak_learning_rate, warmup
    )
    return optim.join_schedules([rising, falling], [warmup])


def make_optimizer(settings: TrainSettings, steps: int) -> optim.Optimizer:
    """The optimizer of a run of `steps`."""
    return OPTIMIZERS[settings.optimizer](learning_rate(settings, steps), settings.weight_decay)
