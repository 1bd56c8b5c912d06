"""The memory that pruning will take, told before it begins."""

from __future__ import annotations

from typing import Any

from mlx.utils import tree_flatten

from convert.measure.compare import HEAD_ROWS
from convert.measure.report import MAX_TOKENS
from convert.prune.plan import LENGTH, SAMPLES, PruningPlan
from convert.quantize.layerwise import BATCH_TOKENS
from phimlx.checkpoint.load import build_model
from phimlx.errors import ConversionError
from phimlx.models.registry import part_of
from phimlx.sizes import size_text

ITEM = 4  # bytes of a float32, in which everything is measured


def forecast(plan: PruningPlan) -> dict[str, int]:
    """Estimate the bytes at the peak of each part of the work.

    Returns:
        "measuring" the calibration text's way through the model, "comparing" both models.
    """
    model = build_model(plan.checkpoint.config)
    config = model.config
    parameters: dict[str, Any] = dict(tree_flatten(model.parameters()))
    whole = sum(array.size for name, array in parameters.items() if part_of(name) is None)
    embedding: int = model.model.embed_tokens.weight.size
    first: dict[str, Any] = dict(tree_flatten(model.layers[0].parameters()))
    layer = sum(array.size for array in first.values())
    rows = _numbers_of_rows(config.intermediate_size, config.hidden_size)
    states = SAMPLES * LENGTH * config.hidden_size
    # The scores of attention, which fused kernels do without, count as if they were held.
    scores = LENGTH * config.num_attention_heads
    batch = BATCH_TOKENS * (rows + scores)
    measuring = max(embedding, layer + batch) + 2 * states
    if plan.layers is not None and plan.method == "divergence":
        measuring = whole + states + batch + 6 * BATCH_TOKENS * config.vocab_size
    read = 2 * MAX_TOKENS * config.hidden_size
    heads = 2 * embedding + 5 * HEAD_ROWS * config.vocab_size
    comparing = read + max(heads, embedding + layer + LENGTH * (rows + scores))
    return {"measuring": ITEM * measuring, "comparing": ITEM * comparing}


def check_memory(plan: PruningPlan, memory: int) -> None:
    """Raise ConversionError where this machine's memory is not expected to do.

    Args:
        memory: bytes that there are.
    """
    needed = forecast(plan)
    if max(needed.values()) <= memory:
        return
    by_influence = plan.method == "divergence" and needed["measuring"] > memory
    raise ConversionError(
        f"This would take about {size_text(max(needed.values()))} of memory, and this machine has "
        f"{size_text(memory)}.",
        hint="Choose layers with --by influence, which holds one of them at a time."
        if by_influence
        else "Prune on a machine with more, or begin all the same with --ignore-memory.",
    )


def _numbers_of_rows(intermediate: int, hidden: int) -> int:
    """Numbers of a token in a decoder layer while it is computed."""
    return 6 * intermediate + 12 * hidden
