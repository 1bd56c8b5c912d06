"""A kill, a full disk and a broken one at every call that writes; a rerun makes it good."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

from tests.hostile.disk import Disk, Killed
from tests.hostile.sample import sample
from tests.hostile.scenarios import SCENARIOS, Inputs, contents, emptied, prepared

LONGEST = 1000  # characters of what a failure says
MANY = 8  # calls of one command that fail in one way
# What has come or been trained stays after an error, for the rerun to go on with.
KEEPING = ("train", "download", "download to a folder", "convert from the Hub")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    with prepared(tmp_path_factory.mktemp("writes")) as found:
        yield found


def points(calls: list[tuple[str, str]]) -> list[int]:
    """The calls that differ: of many that write one after the other to a file, the first two and
    the last."""
    numbers: list[int] = []
    for _, group in groupby(range(len(calls)), key=lambda number: calls[number]):
        first, *rest = group
        numbers += [first, *rest[:1], *rest[1:][-1:]]
    return numbers


def disturbed(inputs: Inputs, name: str, how: str, at: int) -> list[str]:
    """What is wrong after one failure and a rerun, in words."""
    scenario, wrong = SCENARIOS[name], []
    whole = WHOLE[name]
    emptied(inputs)
    disk = Disk(inputs.work, at, how)
    with disk.mounted():
        try:
            result = scenario.run(inputs)
        except Killed:
            result = None
    if result is None:
        left = contents(inputs.work) if name != "train" else {}
        for path, content in left.items():
            shown = not any(part.startswith(".") for part in Path(path).parts)
            if shown and not path.startswith("hub/") and content != whole.get(path, content):
                wrong.append(f"half of {path} is there")
    elif result.exit_code:
        said = "Error:" + result.stderr.rpartition("Error:")[2]
        if "Error: " not in said or "unexpected" in said or len(said) > LONGEST:
            wrong.append(f"it says {said[-300:]!r}")
        if how == "full" and name not in KEEPING:
            rest = [path for path in contents(inputs.work) if path not in whole]
            if rest:
                wrong.append(f"it leaves {rest}")
    again = scenario.again(inputs)
    after = contents(inputs.work)
    nothing_to_do = "exists already" in again.output or "is complete" in again.output
    if again.exit_code and not (after == whole and nothing_to_do):
        wrong.append(f"the rerun says {again.output[-300:]!r}")
    if after != whole:
        names = [p for p in {**after, **whole} if after.get(p, 0) != whole.get(p, 0)]
        wrong.append(f"the rerun makes others: {names[:5]}")
    return wrong


WHOLE: dict[str, dict[str, object]] = {}
CALLS: dict[str, list[tuple[str, str]]] = {}


def undisturbed(inputs: Inputs, name: str) -> list[tuple[str, str]]:
    """Run once as it should be; returns the calls."""
    if name not in CALLS:
        emptied(inputs)
        SCENARIOS[name].run(inputs)  # which fills caches
        emptied(inputs)
        disk = Disk(inputs.work)
        with disk.mounted():
            result = SCENARIOS[name].run(inputs)
        assert result.exit_code == 0, result.output
        CALLS[name], WHOLE[name] = disk.calls, contents(inputs.work)
    return CALLS[name]


HOWS = ("kill", "half", "full", "broken")


def met(inputs: Inputs, name: str, how: str, most: int) -> None:
    """Fail at so many calls; a rerun has to make each good."""
    calls = undisturbed(inputs, name)
    numbers = points(calls)
    if how == "full":  # which removing things never is
        numbers = [number for number in numbers if calls[number][0] not in ("unlink", "rmdir")]
    if how == "half":
        numbers = [number for number in numbers if calls[number][0] in ("write", "pwrite")]
    numbers = sample(numbers, most, f"{name} {how}")
    found = {
        f"{number}: {' '.join(calls[number])}": wrong
        for number in numbers
        if (wrong := disturbed(inputs, name, how, number))
    }
    print(f"{name}, {how}: {len(numbers)} of {len(calls)} calls, {len(found)} wrong")
    assert not found, "\n".join(f"{place}: {wrong}" for place, wrong in found.items())


@pytest.mark.parametrize("name", SCENARIOS)
def test_at_some_calls(inputs: Inputs, name: str) -> None:
    for how, most in zip(HOWS, (3, 1, 2, 1), strict=True):
        met(inputs, name, how, most)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_at_many_calls(inputs: Inputs, name: str, how: str) -> None:
    """At every call where PHIMLX_TEST_EVERYTHING is set."""
    met(inputs, name, how, MANY)
