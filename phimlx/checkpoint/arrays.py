"""Arrays by name written as safetensors, with the disk's own errors."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx


def write_arrays(path: Path, arrays: Mapping[str, mx.array]) -> None:
    """Write arrays as safetensors, on the disk when this returns; raises OSError."""
    with _Stream(path, "w") as stream:
        try:
            mx.save_safetensors(stream, dict(arrays), {"format": "mlx"})
        except RuntimeError:
            if stream.failure is None:
                raise
            raise stream.failure from None
        os.fsync(stream.fileno())


class _Stream(io.FileIO):
    """A file that remembers why it could not be written, which MLX does not tell."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data)
        try:
            while view:
                view = view[super().write(view) :]
        except OSError as error:
            self.failure = error
            raise
        return memoryview(data).nbytes
