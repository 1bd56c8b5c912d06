"""The same folder through mlx-lm, to be timed beside phimlx."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from phimlx.errors import PhimlxError


def load_mlx_lm(
    folder: Path, dtype: mx.Dtype | None = None
) -> Callable[[Sequence[int], int], tuple[float, float]]:
    """Load a model folder with mlx-lm.

    Args:
        dtype: to compute in; as stored where None.

    Returns:
        A function that answers a prompt greedily with so many tokens, and gives the seconds to the
        first one and from there to the last.

    Raises:
        PhimlxError: where mlx-lm is not installed or cannot load the model.
    """
    try:
        from mlx_lm.generate import generate_step
        from mlx_lm.utils import load_model
    except ImportError as missing:
        raise PhimlxError(
            "mlx-lm is not installed.", hint="Install it with: pip install mlx-lm"
        ) from missing
    try:
        model, _ = load_model(folder)
    except Exception as error:  # whatever it raises, it does not load this folder
        raise PhimlxError(
            f"mlx-lm cannot load {folder}: {error}.",
            hint="Leave out --vs; mlx-lm reads text models in MLX format.",
        ) from error
    if dtype is not None:
        model.set_dtype(dtype)

    def generate(prompt: Sequence[int], tokens: int) -> tuple[float, float]:
        start = time.perf_counter()
        steps = generate_step(mx.array(list(prompt)), model, max_tokens=tokens)
        next(steps)
        first = time.perf_counter()
        for _ in steps:
            pass
        return first - start, time.perf_counter() - first

    return generate
