"""The quantization that an MLX config speaks of: its modes, and the table checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phimlx.checkpoint.tensors import Tensors
from phimlx.errors import ConfigError, shortened

# What MLX quantizes to: for each mode its group sizes and its bits.
QUANTIZATION_MODES: dict[str, dict[str, tuple[int, ...]]] = {
    "affine": {"group_size": (32, 64, 128), "bits": (2, 3, 4, 5, 6, 8)},
    "mxfp4": {"group_size": (32,), "bits": (4,)},
    "mxfp8": {"group_size": (32,), "bits": (8,)},
    "nvfp4": {"group_size": (16,), "bits": (4,)},
}
# What MLX takes where nothing is said.
MODE_DEFAULTS = {
    mode: {"group_size": 64, "bits": 4}
    if mode == "affine"
    else {key: values[0] for key, values in allowed.items()}
    for mode, allowed in QUANTIZATION_MODES.items()
}


def read_quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read `quantization` of an MLX config: `group_size`, `bits`, `mode`, and layers that differ.

    A layer's value that is null, as mlx-lm's mixed recipes write it, is the whole table's, or MLX's
    own where the layer has another mode.
    """
    table = config.get("quantization")
    if table is None:
        return None
    if not isinstance(table, dict):
        raise ConfigError(
            f"config.json: quantization is {shortened(table)}, not a table of values."
        )
    checked: dict[str, Any] = _quantization_settings("quantization", table)
    usual = dict(checked)
    for key, value in table.items():
        if isinstance(value, dict):
            given = {name: each for name, each in value.items() if each is not None}
            mode = given.get("mode", usual["mode"])
            known = isinstance(mode, str) and mode != usual["mode"] and mode in MODE_DEFAULTS
            rest = MODE_DEFAULTS[mode] if known else usual
            checked[key] = _quantization_settings(f"quantization.{key}", {**rest, **given})
        elif value is False:
            checked[key] = value
    return checked


def _quantization_settings(place: str, table: Mapping[str, Any]) -> dict[str, Any]:
    mode = table.get("mode")
    mode = "affine" if mode is None else mode
    if not isinstance(mode, str) or mode not in QUANTIZATION_MODES:
        known = ", ".join(QUANTIZATION_MODES)
        raise ConfigError(f"config.json: {place}.mode is {shortened(mode)}, not one of {known}.")
    settings = {"group_size": table.get("group_size"), "bits": table.get("bits"), "mode": mode}
    for key, allowed in QUANTIZATION_MODES[mode].items():
        if settings[key] is None and key in table:
            settings[key] = MODE_DEFAULTS[mode][key]
        if type(settings[key]) is not int or settings[key] not in allowed:
            raise ConfigError(
                f"config.json: {place}.{key} is {shortened(settings[key])}, but {mode} has "
                f"{' or '.join(map(str, allowed))}."
            )
    return settings


def stored_form(path: str, width: int, tensors: Tensors) -> dict[str, Any] | None:
    """Tell from its tensors' shapes how a layer is packed; None where they fit no form of MLX's.

    A row of `width` numbers has `width` x bits / 32 words and a scale for each group, and affine
    alone has biases, so that no two forms look alike.

    Args:
        width: of the layer's input, as config.json has it.
    """
    weight, scales = tensors[f"{path}.weight"], tensors[f"{path}.scales"]
    if len(weight.shape) != 2 or len(scales.shape) != 2 or not scales.shape[1]:
        return None
    words, groups = weight.shape[1], scales.shape[1]
    is_affine = f"{path}.biases" in tensors
    for mode, allowed in QUANTIZATION_MODES.items():
        for bits in allowed["bits"]:
            for group_size in allowed["group_size"]:
                fits = words * 32 == width * bits and groups * group_size == width
                if fits and is_affine == (mode == "affine"):
                    return {"group_size": group_size, "bits": bits, "mode": mode}
    return None
