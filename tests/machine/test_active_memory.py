"""Wired limit and peak memory: right in whatever order computations begin and end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import permutations

import mlx.core as mx
import pytest

from phimlx.generation.engine import Engine
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.machine.active_memory import ActiveMemory
from tests.training.models import tiny

RECOMMENDED = 1000
BEFORE = 17


class FakeMetal:
    """A GPU's process-wide memory settings."""

    def __init__(self) -> None:
        self.limit, self.peak = BEFORE, 0
        self.limits: list[int] = []

    def set_wired_limit(self, limit: int) -> int:
        before, self.limit = self.limit, limit
        self.limits.append(limit)
        return before

    def reset_peak_memory(self) -> None:
        self.peak = 0

    def get_peak_memory(self) -> int:
        return self.peak


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMetal]:
    fake = FakeMetal()
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(
        mx, "device_info", lambda: {"max_recommended_working_set_size": RECOMMENDED}
    )
    for name in ("set_wired_limit", "reset_peak_memory", "get_peak_memory"):
        monkeypatch.setattr(mx, name, getattr(fake, name))
    yield fake
    assert fake.limit == BEFORE


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_last_to_end_restores_the_limit(metal: FakeMetal, order: tuple[int, ...]) -> None:
    memory = ActiveMemory()
    uses = [memory.begin() for _ in range(3)]
    for ended, index in enumerate(order):
        assert metal.limit == RECOMMENDED
        memory.end(uses[index])
        memory.end(uses[index])
        assert metal.limit == (BEFORE if ended == 2 else RECOMMENDED)
    assert metal.limits == [RECOMMENDED, BEFORE]


def test_each_has_the_peak_of_its_own_time(metal: FakeMetal) -> None:
    memory = ActiveMemory()
    metal.peak = 99
    first = memory.begin()
    metal.peak = 5
    second = memory.begin()
    metal.peak = 3
    assert (first.peak, second.peak) == (5, 3)
    memory.end(second)
    metal.peak = 8
    memory.end(first)
    metal.peak = 50
    assert (first.peak, second.peak) == (8, 3)


@pytest.mark.parametrize("engines", [1, 2])
@pytest.mark.parametrize("ended", ["first", "second", "forgotten"])
def test_streams_in_turn_leave_the_limit_as_it_was(
    metal: FakeMetal, engines: int, ended: str
) -> None:
    made = [Engine(tiny()) for _ in range(engines)]
    first, second = (
        made[index % engines].run(Request([5, 6], Sampler(Sampling(), 0), 3)) for index in range(2)
    )
    next(first)
    next(second)
    assert metal.limit == RECOMMENDED
    if ended == "forgotten":
        del first
        gc.collect()
        list(second)
        return
    one, other = (first, second) if ended == "first" else (second, first)
    list(one)
    assert metal.limit == RECOMMENDED
    other.close()
