"""The memory that pruning will take, told before it begins."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from convert.measure.compare import HEAD_ROWS, choose_windows
from convert.measure.report import MAX_TOKENS
from convert.prune.plan import LENGTH, SAMPLES, PruningPlan
from convert.quantize.layerwise import BATCH_TOKENS
from phimlx.checkpoint.head import EMBEDDING
from phimlx.checkpoint.load import build_model, needed_tensors
from phimlx.checkpoint.tensors import FLOATING_DTYPES, Tensor
from phimlx.errors import ConversionError
from phimlx.models.config import ModelConfig
from phimlx.models.registry import part_of
from phimlx.sizes import size_text

ITEM = 4  # bytes of a float32, in which everything is measured
LOGITS = 8  # arrays of some tokens' logits at a time, of two models together
FIRST = "model.layers.0."


def forecast(plan: PruningPlan) -> dict[str, int]:
    """Estimate the bytes at the peak of each part of the work.

    Returns:
        "measuring" the calibration text's way through the model, "comparing" both models.
    """
    checkpoint = plan.checkpoint
    model = build_model(checkpoint.config)
    config = model.config
    tensors = needed_tensors(checkpoint, model)
    whole = _held(tensor for name, tensor in tensors.items() if part_of(name) is None)
    embedding = _held(
        tensor for name, tensor in tensors.items() if name.startswith(f"{EMBEDDING}.")
    )
    layer = _held(tensor for name, tensor in tensors.items() if name.startswith(FIRST))
    states = ITEM * SAMPLES * LENGTH * config.hidden_size
    batch = ITEM * BATCH_TOKENS * _numbers_of_token(config, LENGTH, "mlp" in plan.counts)
    logits = ITEM * HEAD_ROWS * LOGITS * config.vocab_size
    measuring = max(embedding, layer + batch) + 2 * states
    if plan.layers is not None and plan.method == "divergence":
        measuring = whole + 2 * states + max(batch, logits)
    read = ITEM * 2 * MAX_TOKENS * config.hidden_size
    longest = max(each.length for each in choose_windows(MAX_TOKENS, config, MAX_TOKENS))
    window = ITEM * longest * _numbers_of_token(config, longest, False)
    comparing = read + max(2 * embedding + logits, embedding + layer + window)
    return {"measuring": measuring, "comparing": comparing}


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


def _held(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors as they are computed with: packed ones as they are, others in float32."""
    return sum(
        ITEM * prod(each.shape) if each.dtype in FLOATING_DTYPES else each.nbytes
        for each in tensors
    )


def _numbers_of_token(config: ModelConfig, length: int, recorded: bool) -> int:
    """Numbers of a token at the peak of a decoder layer, which is in its attention or its mlp.

    Args:
        length: of the window that the token is in. The scores of attention, which fused kernels do
            without, count as if they were held.
        recorded: whether inputs of the mlp's last projection are squared on the way.
    """
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    attention = 15 * config.hidden_size + 2 * heads * config.head_dim
    attention += config.num_attention_heads * length
    mlp = 4 * config.hidden_size + (7 if recorded else 6) * config.intermediate_size
    return max(attention, mlp)
