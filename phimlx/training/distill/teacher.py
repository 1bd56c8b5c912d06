"""A teacher's probabilities at every position that a student learns from, computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from phimlx.errors import TrainingError
from phimlx.generation.nonfinite import nonfinite_error
from phimlx.machine.reductions import split_logsumexp
from phimlx.models.base import CausalLM
from phimlx.models.config import ModelConfig
from phimlx.training.data.batches import Batches, Example
from phimlx.training.distill.divergence import LEFT_OUT
from phimlx.training.distill.logits_file import LOWEST, Arrays, LogitsWriter
from phimlx.training.forward import inputs_of, supervised_states
from phimlx.training.loss import CHUNK_ROWS

BATCH_TOKENS = 4096  # of one pass; a longer example has one of its own
SECONDS = 5.0  # between two notes of how far it has come

FLOAT32 = 4
ARRAYS = 4  # of logits in float32 that are there at one time
WIDTHS = 8  # hidden states of a pass, or as much, that are there at one time


def working_memory(config: ModelConfig, longest: int, itemsize: int) -> int:
    """Estimate the bytes that computing takes beside the teacher's weights.

    Args:
        longest: tokens of the longest example.
        itemsize: bytes of a number in the model's computation.
    """
    tokens = max(BATCH_TOKENS, longest)
    numbers = WIDTHS * config.hidden_size + 3 * config.intermediate_size
    scores = config.num_attention_heads * longest
    logits = ARRAYS * CHUNK_ROWS * config.vocab_size * FLOAT32
    return tokens * (numbers + scores) * itemsize + logits


def compute(
    model: CausalLM,
    writer: LogitsWriter,
    advance: Callable[[int], object],
    stop_requested: Callable[[], bool] = lambda: False,
) -> bool:
    """Write what is not yet written of a file; whether all of it is there.

    Args:
        advance: called with the number of positions that are done, earlier ones first.
        stop_requested: asked after each pass; what has been computed is kept.

    Raises:
        GenerationError: where the model computes no numbers.
        TrainingError: where the file cannot be written.
    """
    plan = writer.plan
    model.eval()
    advance(plan.offsets[writer.done])
    noted = time.monotonic()
    try:
        for group in groups(plan.examples[writer.done :]):
            if stop_requested():
                return False
            before = writer.done
            writer.add(len(group), likeliest(model, group, plan.k, plan.temperature))
            advance(plan.offsets[writer.done] - plan.offsets[before])
            if time.monotonic() - noted > SECONDS:
                writer.save()
                noted = time.monotonic()
    finally:
        writer.save()
        mx.clear_cache()
    writer.finish()
    return True


def groups(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Divide examples, the longest first, into those that share a pass."""
    start = 0
    while start < len(examples):
        count = max(1, BATCH_TOKENS // examples[start].inputs)
        yield examples[start : start + count]
        start += count


def likeliest(model: CausalLM, group: Sequence[Example], k: int, temperature: float) -> Arrays:
    """The k likeliest tokens at each learned position of some examples, the longest first.

    Returns:
        tokens int `[n, k]`, their log-probabilities `logs` `[n, k]`, and that of all others
        together, `rest` `[n]`, example after example.
    """
    (batch,) = Batches(group, len(group)).epoch(0)
    inputs = inputs_of(batch, model.config.rope)
    states = supervised_states(model, inputs, mx.random.key(0))
    count = batch.supervised_tokens
    parts: list[list[np.ndarray]] = []
    for start in range(0, count, CHUNK_ROWS):
        logits = model.head(states[start : min(start + CHUNK_ROWS, count)])
        found = split(logits, k, temperature)
        mx.eval(found)
        parts.append([np.array(each) for each in found])
    tokens, logs, rest = (np.concatenate(each) for each in zip(*parts, strict=True))
    if not np.isfinite(rest).all() or not np.isfinite(logs).all():
        raise nonfinite_error(model, batch.tokens[0].tolist())
    return {"tokens": tokens, "logs": np.maximum(logs, LOWEST), "rest": np.maximum(rest, LOWEST)}


def split(logits: mx.array, k: int, temperature: float) -> tuple[mx.array, mx.array, mx.array]:
    """The k largest of `[rows, vocab]` logits, likeliest first: tokens, log-probabilities, and the
    log-probability of all others together."""
    wide = logits.astype(mx.float32) / temperature
    if not 0 < k < wide.shape[-1]:
        raise TrainingError(f"top_k is {k}, but the vocabulary has {wide.shape[-1]:,} tokens.")
    tokens = mx.argpartition(-wide, k - 1, axis=-1)[:, :k]
    order = mx.argsort(-mx.take_along_axis(wide, tokens, axis=-1), axis=-1)
    tokens = mx.take_along_axis(tokens, order, axis=-1)
    largest, log_total = split_logsumexp(wide)
    others = mx.put_along_axis(wide, tokens, mx.array(LEFT_OUT), axis=-1)
    rest_largest, rest_total = split_logsumexp(others)
    logs = (mx.take_along_axis(wide, tokens, axis=-1) - largest) - log_total
    rest = (rest_largest - largest) + (rest_total - log_total)
    return tokens, logs, rest[:, 0]
