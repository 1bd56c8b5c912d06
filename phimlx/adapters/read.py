"""Reading an adapter's folder, in either format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from phimlx.adapters.adapter import Adapter
from phimlx.adapters.files import CONFIG
from phimlx.adapters.mlx_lm import WEIGHTS, read_mlx_lm
from phimlx.adapters.peft import OWN_FILE, PEFT_WEIGHTS, as_own, read_peft
from phimlx.errors import CheckpointError, ConfigError
from phimlx.files import read_json

PICKLED = "Only safetensors weights are read, never .bin, .pt or .npz files."


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter in a folder of mlx-lm's format, ours, or PEFT's.

    Raises:
        ConfigError, CheckpointError: naming what is missing, unknown or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no adapter folder {folder}.", hint="An adapter is a folder on this machine."
        )
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} holds no {CONFIG}, so it is not an adapter folder.")
    config = read_json(folder / CONFIG)
    is_peft, remarks = _is_peft(config, folder)
    file = folder / (PEFT_WEIGHTS if is_peft else WEIGHTS)
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no {file.name}.", hint=PICKLED)
    adapter = (read_peft if is_peft else read_mlx_lm)(config, file)
    if is_peft and (folder / OWN_FILE).is_file():
        adapter = as_own(adapter, folder / OWN_FILE)
    return replace(adapter, remarks=(*adapter.remarks, *remarks))


def _is_peft(config: Mapping[str, Any], folder: Path) -> tuple[bool, tuple[str, ...]]:
    """Decide by the weights that are there, and by the config where both are; and say so."""
    wants = "peft_type" in config and "fine_tune_type" not in config
    has = [(folder / name).is_file() for name in (WEIGHTS, PEFT_WEIGHTS)]
    if not any(has):
        return "peft_type" in config, ()
    if not all(has):
        return has[1], ()
    read, left = (PEFT_WEIGHTS, WEIGHTS) if wants else (WEIGHTS, PEFT_WEIGHTS)
    return wants, (f"{folder} holds {WEIGHTS} and {PEFT_WEIGHTS}: {read} is read, {left} is not.",)
