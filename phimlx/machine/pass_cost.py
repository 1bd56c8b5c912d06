"""The cost of a forward pass over several tokens, relative to one: published or measured.

Decoding waits for memory: the weights are read once whether a pass computes one token or a few, so
a draft of some tokens is checked almost for free, and one of many is not. Where that turns depends
on the chip, the backend and the model; `phimlx bench` measures it and keeps it in the cache folder.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.errors import ConfigError
from phimlx.files import read_json, write_json
from phimlx.folders import cache_folder

if TYPE_CHECKING:
    import mlx.nn as nn

FORMAT = 1  # of the kept files; to be raised where their meaning changes
MAX_FILE = 1 << 16  # bytes


@dataclass(frozen=True)
class PassCost:
    """A cost curve.

    Attributes:
        points: (tokens, cost) with rising tokens; the first is (1, 1.0). Between two the cost is
            on the line that joins them; beyond the last it grows as the tokens do.
        measured: whether on this machine, with this model.
    """

    points: tuple[tuple[int, float], ...]
    measured: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError where the points are no curve."""
        rising = all(one < other for (one, _), (other, _) in itertools.pairwise(self.points))
        costs = [cost for _, cost in self.points]
        if self.points[:1] != ((1, 1.0),) or not rising:
            raise ValueError("the points of a cost curve begin at (1, 1.0) and go on to the right")
        if not all(0 < cost < math.inf for cost in costs):
            raise ValueError("a cost is a number above 0")

    def cost(self, tokens: int) -> float:
        """Cost of a pass over `tokens` tokens, 1 or more, in passes over one."""
        place = bisect_left(self.points, tokens, key=lambda point: point[0])
        if place == len(self.points):
            last, cost = self.points[-1]
            return cost * tokens / last
        right, above = self.points[place]
        if right == tokens:
            return above
        left, below = self.points[place - 1]
        return below + (above - below) * (tokens - left) / (right - left)


PUBLISHED = PassCost(((1, 1.0), (2, 1.0), (3, 1.13), (4, 1.43), (8, 2.84), (10, 4.5), (32, 4.5)))
"""A 4-bit model on an M4 Pro, as users of mlx-lm's speculative decoding published it."""


def load_curve(model: nn.Module, folder: Path | None = None) -> PassCost:
    """Read the curve measured for a model on this machine; `PUBLISHED` where there is none.

    A file that is damaged, or was written for something else, counts as none.

    Args:
        model: as it computes, quantized and in its dtype; its values do not matter.
        folder: where curves are kept; in the cache folder of phimlx where None.
    """
    about = _about(model)
    try:
        kept = read_json(_file(about, folder), limit=MAX_FILE, missing_ok=True)
        if {key: kept.get(key) for key in about} != about:
            return PUBLISHED
        points = tuple((int(tokens), float(cost)) for tokens, cost in kept["points"])
        return PassCost(points, measured=True)
    except (ConfigError, KeyError, TypeError, ValueError, OverflowError):
        return PUBLISHED


def save_curve(model: nn.Module, curve: PassCost, folder: Path | None = None) -> Path:
    """Keep a curve that was measured here, in place of an earlier one; arguments as `load_curve`.

    Returns:
        Its file.

    Raises:
        OSError: where it cannot be written.
    """
    about = _about(model)
    file = _file(about, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**about, "points": [list(point) for point in curve.points]})
    return file


def curves_folder() -> Path:
    """Folder of the kept curves."""
    return cache_folder() / "pass-costs"


def fingerprint(model: nn.Module) -> str:
    """Digest the names, shapes and dtypes of a model's parameters; no weight is read.

    An adapter beside the weights, which costs time, makes another model of it.
    """
    from mlx.utils import tree_flatten

    flat: Any = tree_flatten(model.parameters())
    lines = sorted(f"{name} {array.dtype} {list(array.shape)}" for name, array in flat)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _about(model: nn.Module) -> dict[str, Any]:
    """What a curve depends on."""
    from phimlx.machine.device import backend, device_name

    return {
        "format": FORMAT,
        "device": device_name(),
        "backend": backend(),
        "model": fingerprint(model),
    }


def _file(about: Mapping[str, Any], folder: Path | None) -> Path:
    digest = hashlib.sha256("\n".join(map(str, about.values())).encode()).hexdigest()
    return (folder or curves_folder()) / f"{digest[:32]}.json"
