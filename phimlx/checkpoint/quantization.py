"""The quantization that an MLX config speaks of: its modes, and the table checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phimlx.errors import ConfigError, shortened

# What MLX quantizes to: for each mode its group sizes and its bits.
QUANTIZATION_MODES: dict[str, dict[str, tuple[int, ...]]] = {
    "affine": {"group_size": (32, 64, 128), "bits": (2, 3, 4, 5, 6, 8)},
    "mxfp4": {"group_size": (32,), "bits": (4,)},
    "mxfp8": {"group_size": (32,), "bits": (8,)},
    "nvfp4": {"group_size": (16,), "bits": (4,)},
}


def read_quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`quantization` of an MLX config: `group_size`, `bits`, `mode`, and layers that differ."""
    table = config.get("quantization")
    if table is None:
        if config.get("quantization_config") is not None:
            raise ConfigError(
                "config.json: quantization_config is another framework's; phimlx reads MLX's "
                "quantization.",
                hint="Convert the original model: phimlx convert MODEL --mlx-path OUT -q",
            )
        return None
    if not isinstance(table, dict):
        raise ConfigError(
            f"config.json: quantization is {shortened(table)}, not a table of values."
        )
    checked: dict[str, Any] = _quantization_settings("quantization", table)
    for key, value in table.items():
        if isinstance(value, dict):
            checked[key] = _quantization_settings(f"quantization.{key}", {**checked, **value})
        elif value is False:
            checked[key] = value
    return checked


def _quantization_settings(place: str, table: Mapping[str, Any]) -> dict[str, Any]:
    mode = table.get("mode", "affine")
    if not isinstance(mode, str) or mode not in QUANTIZATION_MODES:
        known = ", ".join(QUANTIZATION_MODES)
        raise ConfigError(f"config.json: {place}.mode is {shortened(mode)}, not one of {known}.")
    settings = {"group_size": table.get("group_size"), "bits": table.get("bits"), "mode": mode}
    for key, allowed in QUANTIZATION_MODES[mode].items():
        if type(settings[key]) is not int or settings[key] not in allowed:
            raise ConfigError(
                f"config.json: {place}.{key} is {shortened(settings[key])}, but {mode} has "
                f"{' or '.join(map(str, allowed))}."
            )
    return settings
