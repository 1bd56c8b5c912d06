"""Some of many, the same ones each time; all where PHIMLX_TEST_EVERYTHING is set."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from tests.everything import EVERYTHING

Item = TypeVar("Item")


def sample(items: Sequence[Item], most: int, seed: str) -> list[Item]:
    """Take one item of each of `most` parts of a list, equally long ones."""
    if len(items) <= most or EVERYTHING:
        return list(items)
    chance = random.Random(seed)
    edges = [len(items) * part // most for part in range(most + 1)]
    return [items[chance.randrange(*pair)] for pair in pairwise(edges)]
