"""An adapter -> a folder in another format, which appears whole or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import phimlx
from convert.folder import new_folder, refuse_existing, stamps
from phimlx.adapters.adapter import Adapter, Base
from phimlx.adapters.fit import check_fit
from phimlx.adapters.mlx_lm import write_adapter
from phimlx.adapters.peft import write_peft
from phimlx.adapters.read import read_adapter
from phimlx.adapters.split import fused
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import map_model
from phimlx.hub.resolve import resolve_adapter

WRITERS = {"peft": write_peft, "mlx-lm": write_adapter}


def export_adapter(
    source: str | Path, out: Path, format: str, model_folder: Path | None = None
) -> Adapter:
    """Write an adapter in another format.

    Args:
        source: its folder, or a Hub id.
        out: the folder to make.
        format: one of `WRITERS`.
        model_folder: of the model that it is for, which it then names as its base.

    Returns:
        The adapter.

    Raises:
        ConfigError, CheckpointError: where the adapter cannot be read, does not fit the model, or
            cannot be expressed in that format.
        ConversionError: where `out` exists, is being written by another process, or cannot be
            written.
    """
    out = out.absolute()
    refuse_existing(out)
    folder = Path(resolve_adapter(source))
    adapter = read_adapter(folder)
    if model_folder is not None:
        checkpoint = Checkpoint(model_folder)
        model = map_model(checkpoint)
        adapter = fused(adapter, model)
        check_fit(adapter, model, checkpoint.folder, checkpoint.config)
        base = Base.of(checkpoint.folder, checkpoint.config)
        adapter = replace(adapter, base=base, blocks=len(model.layers))
    sources = stamps(sorted(file for file in folder.iterdir() if file.is_file()))
    plan = repr((phimlx.__version__, format, sources, adapter.base))
    with new_folder(out, plan, names=()) as journal:
        WRITERS[format](journal.folder, adapter)
    return adapter
