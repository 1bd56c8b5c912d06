"""Scalings of a plain rotary embedding that reach further than a model was trained.

Inverse frequencies are rounded to float32 at every step, as the reference rounds them.
Source: transformers `modeling_rope_utils.py`.
"""

from __future__ import annotations

import json
import math
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Scaling(ABC):
    """A scaling of a plain rotary embedding.

    Attributes:
        kind: its name in a config.
        follows_length: whether the frequencies depend on how long a sequence is.
        factor: how much further it reaches.
        original: tokens that the model was trained with.
    """

    kind: ClassVar[str]
    follows_length: ClassVar[bool] = False

    factor: float
    original: int

    @abstractmethod
    def inverse_frequencies(self, dims: int, theta: float, length: int) -> list[float]:
        """Compute the `dims / 2` inverse frequencies, each a float32.

        Args:
            theta: the base.
            length: of the sequence, in tokens.
        """


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """Positions divided by a factor (kaiokendev)."""

    kind: ClassVar[str] = "linear"

    def inverse_frequencies(self, dims: int, theta: float, length: int) -> list[float]:
        return [float32(float32(1 / power) / float32(self.factor)) for power in powers(dims, theta)]


@dataclass(frozen=True)
class DynamicScaling(Scaling):
    """NTK-aware: the base grows with a sequence that is longer than the model was trained with."""

    kind: ClassVar[str] = "dynamic"
    follows_length: ClassVar[bool] = True

    def inverse_frequencies(self, dims: int, theta: float, length: int) -> list[float]:
        base = theta
        if length > self.original:
            stretch = float32(float32(float32(self.factor) * length) / self.original)
            stretch = float32(stretch - float32(self.factor - 1))
            base = float32(theta * float32(stretch ** (dims / (dims - 2))))
        return [float32(1 / power) for power in powers(dims, base)]


@dataclass(frozen=True)
class YarnScaling(Scaling):
    """YaRN (arXiv 2309.00071): slow frequencies divided by a factor, fast ones kept.

    Attributes:
        beta_fast, beta_slow: turns within `original` tokens, from which on a frequency is kept, and
            up to which it is divided in full; in between it is something of both.
        truncate: whether that range ends at whole channels.
    """

    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    kind: ClassVar[str] = "yarn"

    def inverse_frequencies(self, dims: int, theta: float, length: int) -> list[float]:
        low, high = self._range(dims, theta)
        found = []
        for channel, power in enumerate(powers(dims, theta)):
            ramp = float32(float32(channel - float32(low)) / float32(high - low))
            kept = float32(1 - min(max(ramp, 0.0), 1.0))
            divided = float32(1 / float32(float32(self.factor) * power))
            found.append(
                float32(float32(divided * float32(1 - kept)) + float32(float32(1 / power) * kept))
            )
        return found

    def _range(self, dims: int, theta: float) -> tuple[float, float]:
        """Find the channels between which frequencies are something of both."""

        def channel(turns: float) -> float:
            return dims * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        return low, high + 0.001 if low == high else high


SCALINGS = ("linear", "dynamic", "yarn")


def yarn_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """Compute the scale of cos and sin: 0.1 ln(factor) + 1, or a quotient of two such (DeepSeek).

    Args:
        mscale, mscale_all_dim: in front of the logarithms of the quotient; 0 where not given.
    """

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def powers(dims: int, theta: float) -> list[float]:
    """Compute theta^(2i / dims) for each of `dims / 2` frequencies, rounded to float32.

    A power is rounded to the nearest float32, as torch does for a single number; its vectorized
    one misses that by one unit for 1 of Phi-4-mini's 48.
    """
    return [float32(theta ** float32(2 * i / dims)) for i in range(dims // 2)]


def float32(value: float) -> float:
    """Round to the nearest float32."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def read_argument(text: str) -> dict[str, Any]:
    """Read a scaling as a person writes it, into the form that a config has.

    Args:
        text: `yarn:4`, `yarn:4:16384` with the length that the model was trained with, `default`
            for none, or a JSON object.

    Raises:
        ValueError: where it is neither.
    """
    if text.lstrip().startswith("{"):
        table: dict[str, Any] = json.loads(text)
        return table
    kind, *numbers = text.split(":")
    if kind == "default" and not numbers:
        return {"rope_type": kind}
    factor, *rest = map(float, numbers)
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if rest:
        (original,) = rest
        scaling["original_max_position_embeddings"] = int(original)
    return scaling
