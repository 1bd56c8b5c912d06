"""Every hostile input ends soon, in little memory, and well or with one sentence."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.inputs import ROWS, kinds
from tests.hostile.sample import sample

SECONDS = 10  # of CPU for one input
PATIENCE = 120  # seconds until an input counts as hanging, whatever else the machine does
BYTES = 1 << 30  # by which memory may grow
SOME, MANY = 5, 100  # inputs of each kind


class Child:
    """A process that meets inputs; another takes its place where one ends it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def meet(self, name: str) -> str | None:
        """Meet an input; what is wrong, in words."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.hostile.child"],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{name}\n".encode())
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            answer = self.process.stdout.readline() if selector.select(PATIENCE) else b""
        if not answer:
            ended = self.process.poll()
            self.end()
            return "hangs" if ended is None else f"the process ended with {ended}"
        wrong, seconds, grew = json.loads(answer)
        if wrong is None and seconds > SECONDS:
            wrong = f"takes {seconds:.1f} s"
        if wrong is None and grew > BYTES:
            wrong = f"takes {grew >> 20} MB"
        return None if wrong is None else str(wrong)

    def end(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.end()


def meet(child: Child, names: list[str]) -> None:
    found = {name: wrong for name in names if (wrong := child.meet(name))}
    assert not found, f"{len(found)} of {len(names)}:\n" + "\n".join(
        f"{name}: {wrong}" for name, wrong in found.items()
    )


def of_kind(kind: str) -> list[str]:
    return [name for name in ROWS if name.partition(":")[0] == kind]


def test_there_are_many() -> None:
    assert len(ROWS) > 4000
    assert min(len(of_kind(kind)) for kind in kinds()) >= 9


@pytest.mark.parametrize("kind", [*kinds()])
def test_some(child: Child, kind: str) -> None:
    names = of_kind(kind)
    meet(child, names[:: max(1, len(names) // SOME)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*kinds()])
def test_many(child: Child, kind: str) -> None:
    """Every one where PHIMLX_TEST_EVERYTHING is set."""
    meet(child, sample(of_kind(kind), MANY, kind))
