"""Recipes: which layers are quantized and how, as data, with named ones for each architecture.

A layer with adapters beside it goes by the path that it has in a model without them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from phimlx.checkpoint.quantization import QUANTIZATION_MODES
from phimlx.errors import ConversionError, shortened
from phimlx.files import parse_toml, read_text
from phimlx.models.registry import Architecture, part_of

# What mlx-lm takes where nothing is said.
DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}

MAX_RECIPE_BYTES = 1_000_000

PARTS = ("adapters", "encoders")  # of a multimodal model beside the language model
PART_BITS = 8  # where they are quantized

UNIFORM = "uniform"  # the recipe that treats all layers of the language model alike


@dataclass(frozen=True)
class Quantization:
    """MLX's quantization: `bits` a weight, and what a group of `group_size` shares.

    That is a scale and a bias of 16 bits in affine mode, a scale of 8 bits in the others.

    Raises:
        ConversionError: for what MLX does not have.
    """

    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    def __post_init__(self) -> None:
        allowed = QUANTIZATION_MODES.get(self.mode)
        if allowed is None:
            known = ", ".join(QUANTIZATION_MODES)
            raise ConversionError(f"MLX has no quantization {self.mode}; it has {known}.")
        if self.group_size not in allowed["group_size"] or self.bits not in allowed["bits"]:
            raise ConversionError(
                f"MLX has no {self.mode} quantization to {self.bits} bits in groups of "
                f"{self.group_size}.",
                hint=f"{self.mode} has {_choice(allowed['bits'])} bits in groups of "
                f"{_choice(allowed['group_size'])}.",
            )

    @classmethod
    def of(
        cls, mode: str = "affine", bits: int | None = None, group_size: int | None = None
    ) -> Quantization:
        """Make one with what mlx-lm takes for a mode where a value is not given."""
        usual_group_size, usual_bits = DEFAULTS.get(mode, DEFAULTS["affine"])
        return cls(group_size or usual_group_size, bits or usual_bits, mode)

    def __str__(self) -> str:
        mode = "" if self.mode == "affine" else f" ({self.mode})"
        return f"{self.bits} bits in groups of {self.group_size}{mode}"


@dataclass(frozen=True)
class Rule:
    """A quantization of the layers whose path a pattern matches.

    Attributes:
        match: of a whole path, with `*` for anything: `*.down_proj`. Adapters and encoders are
            only reached by a pattern that holds what their paths do: `*.lora_*`.
        quantization: None leaves them as they are.
        ends: only in this part of the blocks from the first on, and up to the last (0.125: an
            eighth at either end, and one block at least); None for all.
    """

    match: str
    quantization: Quantization | None
    ends: float | None = None

    def applies(self, path: str, blocks: int) -> bool:
        part = part_of(path)
        if part is not None and part_of(self.match) != part:
            return False
        if not fnmatchcase(path.removesuffix(".base_layer"), self.match):
            return False
        if self.ends is None:
            return True
        block = re.match(r"model\.layers\.(\d+)\.", path)
        count = max(1, int(blocks * self.ends))
        return block is not None and not count <= int(block[1]) < blocks - count


@dataclass(frozen=True)
class Recipe:
    """Rules, of which the first that matches decides, and `default` for every other layer.

    Adapters and encoders that no rule names stay as they are.
    """

    name: str
    default: Quantization
    rules: tuple[Rule, ...] = ()

    def assign(
        self, widths: Mapping[str, int], blocks: int
    ) -> tuple[dict[str, Quantization | None], tuple[str, ...]]:
        """Choose what becomes of each layer.

        Args:
            widths: inner dimension of each layer that can be quantized, by path.
            blocks: how many the model has.

        Returns:
            By path, None for a layer that stays as it is; and the layers of these that only stay
            because groups do not divide their width, as in `mlx_lm.convert`.
        """
        assigned: dict[str, Quantization | None] = {}
        undivided = []
        for path, width in widths.items():
            rule = next((rule for rule in self.rules if rule.applies(path, blocks)), None)
            usual = self.default if part_of(path) is None else None
            chosen = usual if rule is None else rule.quantization
            if chosen is not None and width % chosen.group_size:
                undivided.append(path)
                chosen = None
            assigned[path] = chosen
        return assigned, tuple(sorted(undivided))

    def with_parts(self, architecture: Architecture, parts: Collection[str]) -> Recipe:
        """Make the same with these of `PARTS` at 8 bits, whatever its own rules say of them."""
        groups = max(32, min(64, self.default.group_size))  # which divide the adapters' ranks
        more = Quantization(groups, PART_BITS)
        marks = (mark for part in parts for mark in architecture.parts[part])
        rules = tuple(Rule(f"*{mark}*", more) for mark in marks)
        return replace(self, rules=rules + self.rules)

    def in_groups_of(self, group_size: int) -> Recipe:
        """Make the same with other groups."""
        rules = tuple(
            replace(rule, quantization=replace(rule.quantization, group_size=group_size))
            if rule.quantization is not None
            else rule
            for rule in self.rules
        )
        return replace(self, default=replace(self.default, group_size=group_size), rules=rules)


def mixed(low: int, high: int, architecture: Architecture) -> Recipe:
    """Give `low` bits, and `high` where an error costs this architecture most."""
    more = Quantization(bits=high)
    rules = tuple(Rule(each.pattern, more, each.ends) for each in architecture.sensitive_layers)
    return Recipe(f"mixed-{low}-{high}", Quantization(bits=low), rules)


# Only pairs that beat a uniform quantization of their size on phi-4-nano, which none does that is
# more than two bits apart.
MIXED = ((3, 5), (4, 5), (4, 6), (6, 8))


def recipes_of(architecture: Architecture) -> dict[str, Recipe]:
    """Make an architecture's named recipes, beside the uniform one."""
    if not architecture.sensitive_layers:
        return {}
    made = (mixed(low, high, architecture) for low, high in MIXED)
    return {recipe.name: recipe for recipe in made}


def named(name: str, architecture: Architecture) -> Recipe:
    """An architecture's recipe of that name."""
    recipes = recipes_of(architecture)
    if name not in recipes:
        known = f"there is {', '.join(recipes)}" if recipes else "there is none"
        raise ConversionError(
            f"There is no recipe {shortened(name)} for {architecture.model_type} models; {known}.",
            hint="A recipe of your own is a file whose name ends in .toml.",
        )
    return recipes[name]


def read_recipe(file: Path) -> Recipe:
    """A recipe file in TOML.

        bits = 4                      # of every layer that no rule matches; default: 4
        group_size = 64               # default: mode's own
        mode = "affine"               # or "mxfp4", "mxfp8", "nvfp4"

        [[layers]]                    # the first rule that matches a layer decides
        match = "*.down_proj"
        ends = 0.125                  # only in the first and last eighth of the blocks
        bits = 6

        [[layers]]
        match = "lm_head"
        keep = true                   # as it is

    Raises:
        ConversionError: naming the file and the value that is wrong.
    """
    text = read_text(file, ConversionError, limit=MAX_RECIPE_BYTES)
    try:
        table = parse_toml(text)
    except ValueError as error:
        raise ConversionError(f"The recipe {file} is not valid TOML ({error}).") from error
    _known(file, "", table, {"bits", "group_size", "mode", "layers"})
    default = _quantization(file, "", table, {})
    layers = table.get("layers", [])
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise ConversionError(f"{file.name}: layers is no list of [[layers]] tables.")
    rules = tuple(_rule(file, f"layers[{i}].", layer, table) for i, layer in enumerate(layers))
    return Recipe(file.stem, default, rules)


def _rule(file: Path, place: str, table: Mapping[str, Any], default: Mapping[str, Any]) -> Rule:
    _known(file, place, table, {"match", "ends", "keep", "bits", "group_size", "mode"})
    match, ends, keep = table.get("match"), table.get("ends"), table.get("keep", False)
    if not isinstance(match, str) or not match:
        raise ConversionError(
            f"{file.name}: {place}match is {shortened(match)}, not a pattern of layer paths."
        )
    if ends is not None and (type(ends) not in (int, float) or not 0 < ends <= 0.5):
        raise ConversionError(
            f"{file.name}: {place}ends is {shortened(ends)}, not a number above 0 and up to 0.5."
        )
    if not isinstance(keep, bool):
        raise ConversionError(f"{file.name}: {place}keep is {shortened(keep)}, not true or false.")
    if keep:
        extra = sorted(table.keys() & {"bits", "group_size", "mode"})
        if extra:
            raise ConversionError(f"{file.name}: {place}{extra[0]} makes no sense with keep.")
        return Rule(match, None, ends)
    return Rule(match, _quantization(file, place, table, default), ends)


def _quantization(
    file: Path, place: str, table: Mapping[str, Any], default: Mapping[str, Any]
) -> Quantization:
    if "mode" in table:
        default = {}  # another mode has other bits and groups
    values = {key: table.get(key, default.get(key)) for key in ("mode", "bits", "group_size")}
    mode = "affine" if values["mode"] is None else values["mode"]
    if not isinstance(mode, str) or mode not in QUANTIZATION_MODES:
        raise ConversionError(
            f"{file.name}: {place}mode is {shortened(mode)}; it must be one of "
            f"{', '.join(QUANTIZATION_MODES)}."
        )
    for key in ("bits", "group_size"):
        allowed = QUANTIZATION_MODES[mode][key]
        if values[key] is not None and (type(values[key]) is not int or values[key] not in allowed):
            raise ConversionError(
                f"{file.name}: {place}{key} is {shortened(values[key])}, but {mode} has "
                f"{_choice(allowed)}."
            )
    return Quantization.of(mode, values["bits"], values["group_size"])


def _known(file: Path, place: str, table: Mapping[str, Any], keys: set[str]) -> None:
    for key in table:
        if key not in keys:
            raise ConversionError(
                f"{file.name}: {place}{shortened(key)[1:-1]} is not a setting of a recipe."
            )


def _choice(values: tuple[int, ...]) -> str:
    return " or ".join(map(str, values))
