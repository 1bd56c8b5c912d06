"""Optimizers and learning rates by name, from MLX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from phimlx.training.mlx_lm_config import Schedule
from phimlx.training.settings import TrainSettings

Rate = Callable[[mx.array], mx.array]

LOWEST = 0.1  # where a falling rate ends, as a part of its highest
WARMUP_SHARE, WARMUP_STEPS = 0.03, 100

SCHEDULES: dict[str, Callable[[float, int], Rate]] = {
    "cosine": lambda rate, steps: optim.cosine_decay(rate, steps, LOWEST * rate),
    "linear": lambda rate, steps: optim.linear_schedule(rate, LOWEST * rate, steps),
    "constant": lambda rate, steps: optim.linear_schedule(rate, rate, steps),
}

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adamw": optim.AdamW,
    "adam": optim.Adam,
    "adafactor": optim.Adafactor,
    "lion": optim.Lion,
    "muon": optim.Muon,
    "sgd": optim.SGD,
}
USUAL: dict[str, dict[str, Any]] = {
    "adafactor": {"relative_step": False, "scale_parameter": False},
    "sgd": {"momentum": 0.9},
}
WITHOUT_DECAY = ("adam",)  # the others take the settings' rate of it


def warmup_steps(settings: TrainSettings, steps: int) -> int:
    """Steps in which the rate rises, fewer than all."""
    usual = min(WARMUP_STEPS, round(WARMUP_SHARE * steps))
    return min(usual if settings.warmup is None else settings.warmup, steps - 1)


def learning_rate(settings: TrainSettings, steps: int) -> Rate:
    """The rate at each step of a run of `steps`, the first of which is number 0.

    It rises in a straight line, reaches its highest when the warmup is over, and then falls; or it
    is what MLX's own schedule says.
    """
    if settings.schedule is not None:
        return _own_schedule(settings.schedule)
    warmup = warmup_steps(settings, steps)
    falling = SCHEDULES[settings.lr_schedule](settings.peak_learning_rate, max(1, steps - warmup))
    if not warmup:
        return falling
    rising = optim.linear_schedule(
        settings.peak_learning_rate / (warmup + 1), settings.peak_learning_rate, warmup
    )
    return optim.join_schedules([rising, falling], [warmup])


def _own_schedule(schedule: Schedule) -> Rate:
    """Make MLX's schedule as mlx-lm does, from `build_schedule` of its tuner/utils.py."""
    falling: Rate = getattr(optim, schedule.name)(*schedule.arguments)
    if not schedule.warmup:
        return falling
    rising = optim.linear_schedule(schedule.warmup_init, schedule.arguments[0], schedule.warmup)
    return optim.join_schedules([rising, falling], [schedule.warmup + 1])


def make_optimizer(settings: TrainSettings, steps: int) -> optim.Optimizer:
    """The optimizer of a run of `steps`."""
    name, rate = settings.optimizer, learning_rate(settings, steps)
    decay = {} if name in WITHOUT_DECAY else {"weight_decay": settings.weight_decay}
    given = settings.optimizer_config.get(name, {})
    return OPTIMIZERS[name](learning_rate=rate, **(USUAL.get(name, {}) | decay | given))
