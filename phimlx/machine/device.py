"""MLX's default device: its name, and sizes that suit it.

A GPU is filled, a CPU's cache is not left. Everything is a function, for the default device may
change while the process lives.
"""

from __future__ import annotations

import re

import mlx.core as mx


def on_gpu() -> bool:
    """Whether MLX computes on Metal or CUDA, not on the CPU."""
    return mx.default_device().type == mx.DeviceType.gpu


def backend() -> str:
    """Name what MLX computes with: "metal", "cuda" or "cpu"."""
    return ("metal" if mx.metal.is_available() else "cuda") if on_gpu() else "cpu"


def device_name() -> str:
    """Name the default device as its maker does, such as "Apple M4 Pro"."""
    return str(mx.device_info(mx.default_device()).get("device_name", "unnamed device"))


def emulates_bfloat16() -> bool:
    """Whether the GPU has no bfloat16 of its own, so that float16 is quicker: that of M1 and M2.

    Users measured prompts to be read by 20 to 34 % quicker there.
    """
    return backend() == "metal" and re.match(r"Apple M[12]\b", device_name()) is not None


def suited(*, gpu: int, cpu: int) -> int:
    """Sizes of what is computed at once on this device."""
    return gpu if on_gpu() else cpu


def prefill_tokens() -> int:
    """Tokens of a prompt in one forward pass, which bounds working memory."""
    return suited(gpu=2048, cpu=512)


def crops_at_once() -> int:
    """Crops of images in one pass through the image encoder.

    The attention scores of one crop are heads · 1024² numbers: more crops fill the memory without
    filling a GPU any better, and two already leave a CPU's cache.
    """
    return suited(gpu=4, cpu=1)


def queries_at_once() -> int:
    """Patches of an image whose attention to all others is computed at once.

    A GPU's fused attention keeps no scores. A CPU keeps them, and works ahead by several pieces.
    """
    return suited(gpu=1 << 16, cpu=128)
