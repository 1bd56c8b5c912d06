"""The GGUF file that a path means."""

from __future__ import annotations

import re
from pathlib import Path

from phimlx.errors import CheckpointError, some

MAGIC = b"GGUF"
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


def find_gguf(path: Path) -> Path | None:
    """Find the GGUF file that a path means: itself, or the only model of a folder without another.

    Of a model that is split into several files it is the first.

    Raises:
        CheckpointError: where a folder holds GGUF files of several models.
    """
    if path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    models = [
        file for file in files if not (part := SPLIT.fullmatch(file.name)) or int(part[2]) < 2
    ]
    if len(models) > 1:
        raise CheckpointError(
            f"{path} holds {len(models)} GGUF files: {some([file.name for file in models])}.",
            hint="Name the one that is meant.",
        )
    return models[0] if models else None
