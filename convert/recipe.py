"""Which layers are quantized and to how many bits: recipes as data, one table per architecture.

Knows names and widths of layers; knows nothing of their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from phimlx.checkpoint import QUANTIZATION_MODES
from phimlx.errors import ConversionError


@dataclass(frozen=True)
class Quantization:
    """MLX's quantization: `bits` a weight, and a scale and a bias a group of `group_size`.

    Raises:
        ConversionError: for what MLX does not have.
    """

    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    def __post_init__(self) -> None:
        allowed = QUANTIZATION_MODES.get(self.mode, {})
        if self.group_size in allowed.get("group_size", ()) and self.bits in allowed["bits"]:
            return
        raise ConversionError(
            f"MLX has no quantization to {self.bits} bits in groups of {self.group_size} "
            f"({self.mode})."
        )


# A rule is a pattern of layer paths and the bits of what it matches: None for those asked for, 0 to
# leave a layer as it is. The first rule that matches decides.
Rule = tuple[str, int | None]

RECIPES: dict[str, dict[str, tuple[Rule, ...]]] = {
    "phi3": {"uniform": (("*", None),)},
}


def assign(
    rules: tuple[Rule, ...], asked: Quantization, widths: Mapping[str, int]
) -> dict[str, Quantization | None]:
    """What becomes of each layer.

    Args:
        widths: inner dimension of each layer that can be quantized, by path.

    Returns:
        By path; None for a layer that stays as it is, because the recipe says so or because groups
        do not divide its width, as in `mlx_lm.convert`.
    """
    assigned: dict[str, Quantization | None] = {}
    for path, width in widths.items():
        bits = next((bits for pattern, bits in rules if fnmatchcase(path, pattern)), 0)
        bits = asked.bits if bits is None else bits
        divides = width % asked.group_size == 0
        assigned[path] = replace(asked, bits=bits) if bits and divides else None
    return assigned
