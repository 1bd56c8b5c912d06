"""What the device that computes asks of the code: a GPU is filled, a CPU's cache is not left.

Knows MLX's default device; knows nothing of models.
"""

from __future__ import annotations

import mlx.core as mx


def on_gpu() -> bool:
    """Whether MLX computes on Metal or CUDA, not on the CPU."""
    return mx.default_device().type == mx.DeviceType.gpu


def suited(*, gpu: int, cpu: int) -> int:
    """How much to compute at once on this device."""
    return gpu if on_gpu() else cpu
