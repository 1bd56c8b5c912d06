"""Whether a process is one of several that `mlx.launch` or MPI started."""

from __future__ import annotations

import os

VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""By which they tell a process its place."""


def is_launched() -> bool:
    """Whether this process was started as one of several."""
    return any(name in os.environ for name in VARIABLES)
