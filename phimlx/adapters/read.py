"""Reading an adapter's folder, in either format."""

from __future__ import annotations

from pathlib import Path

from phimlx.adapters.adapter import Adapter
from phimlx.adapters.files import CONFIG
from phimlx.adapters.mlx_lm import WEIGHTS, read_mlx_lm
from phimlx.adapters.peft import PEFT_WEIGHTS, read_peft
from phimlx.errors import CheckpointError, ConfigError
from phimlx.files import read_json


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
    is_peft = "peft_type" in config
    file = folder / (PEFT_WEIGHTS if is_peft else WEIGHTS)
    if not file.is_file():
        raise CheckpointError(
            f"{folder} holds no {file.name}.",
            hint="Only safetensors weights are read, never .bin, .pt or .npz files.",
        )
    return (read_peft if is_peft else read_mlx_lm)(config, file)
