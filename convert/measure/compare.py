"""Two models on the same text and weight by weight, one decoder layer in memory at a time.

Everything is computed in float32: on phi-4-nano the rounding of bfloat16 activations alone makes
a KL divergence of 0.05 nats, twenty times what 8 bits cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from convert.read import RowBlock, read_blocks
from convert.tensor_plan import TensorConversion, TensorPlan
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, map_model
from phimlx.errors import PhimlxError
from phimlx.machine.reductions import log_softmax, long_sum, sum_of_squares
from phimlx.models.base import CausalLM, ModelConfig
from phimlx.models.registry import part_of

WINDOW = 512  # tokens; a window past the LongRoPE step has up to as many more than the step
HEAD_ROWS = 128  # positions whose logits are held at once: 100 MB of a vocabulary of 200,000
BLOCK_NUMBERS = 1 << 20  # weights that are compared at once
READ_AHEAD = 2  # blocks


@dataclass(frozen=True)
class Agreement:
    """Agreement of two models on the next token, over windows of one length.

    Attributes:
        windows, length: how many, and tokens in each; every window starts anew.
        long: whether they are past the LongRoPE step, where every key has another rotation.
        tokens: predictions that were compared.
        perplexity_before, perplexity_after: exp of the mean negative log-likelihood of the text.
        divergence: mean KL(before ‖ after) in nats.
        top1: how often the likeliest token is the same.
    """

    windows: int
    length: int
    long: bool
    tokens: int
    perplexity_before: float
    perplexity_after: float
    divergence: float
    top1: float


@dataclass(frozen=True)
class LayerError:
    """One weight matrix.

    Attributes:
        layer: its decoder layer, counted from 0; None for what is in none.
        kind: `qkv_proj`, `o_proj`, `gate_up_proj`, `down_proj`, `embed_tokens` or `lm_head`; for
            all of a multimodal model's other matrices `adapters` or `encoders`.
        error: ‖after - before‖ / ‖before‖ of all its numbers (Frobenius norm).
        bits_before, bits_after: that each of them takes, scales and biases included.
    """

    name: str
    layer: int | None
    kind: str
    error: float
    bits_before: float
    bits_after: float


@dataclass(frozen=True)
class Windows:
    """Stretches of a text, all of `length` tokens."""

    length: int
    long: bool
    starts: tuple[int, ...]


def choose_windows(tokens: int, config: ModelConfig, max_tokens: int) -> list[Windows]:
    """Choose what of a text to read: windows spread evenly, and one past the LongRoPE step.

    Args:
        tokens: length of the text.
        max_tokens: of all windows together; the one past the step takes half of them at most.
    """
    step = longrope_step(config)
    past = [] if step is None else [length_past(step)]
    past = [length for length in past if length <= tokens and 2 * length <= max_tokens]
    usual = min(WINDOW, config.max_position_embeddings, step or WINDOW)
    budget = min(tokens, max_tokens - sum(past))
    length = max(2, min(usual, budget))  # one to read, and one to predict
    count = budget // length
    starts = [(tokens - length) * index // max(1, count - 1) for index in range(count)]
    spread = Windows(length, config.rope.is_long(length), tuple(starts))
    return [spread, *(Windows(length, True, (0,)) for length in past)]


def longrope_step(config: ModelConfig) -> int | None:
    """Tokens above which a model rotates otherwise; None where none of its contexts does."""
    step = config.rope.original_max_position_embeddings
    return step if config.rope.is_long(config.max_position_embeddings) else None


def length_past(step: int) -> int:
    """Compute the length of the window that is read past the LongRoPE step."""
    return step + min(step, WINDOW)


def agreements(
    before: Checkpoint,
    after: Checkpoint,
    tokens: list[int],
    windows: Sequence[Windows],
    advance: Callable[[float], object],
) -> tuple[Agreement, ...]:
    """Both models on all windows of a text.

    Args:
        tokens: of the whole text.
        advance: called with hundredths of this work.
    """
    inputs = [
        mx.array(tokens[start : start + chosen.length])[None]
        for chosen in windows
        for start in chosen.starts
    ]
    first = hidden_states(before, inputs, lambda part: advance(45 * part))
    second = hidden_states(after, inputs, lambda part: advance(45 * part))
    sums = iter(_sums(inputs, first, second, lambda part: advance(10 * part)))
    return tuple(_agreement(chosen, [next(sums) for _ in chosen.starts]) for chosen in windows)


def hidden_states(
    checkpoint: Checkpoint, inputs: Sequence[mx.array], advance: Callable[[float], object]
) -> tuple[CausalLM, list[mx.array]]:
    """Compute what the output head reads of each input; leaves the model's head alone.

    Computes what `CausalLM.hidden_states` does, but reads each decoder layer when its turn
    comes and forgets it before the next.

    Args:
        inputs: each `[1, length]`.
        advance: called with parts of this work.

    Returns:
        Hidden states, each `[length, hidden]`.
    """
    model = map_model(checkpoint)
    model.set_dtype(mx.float32)
    states = [model.embed(input_ids) for input_ids in inputs]
    passes = [model.forward_pass(input_ids) for input_ids in inputs]
    mx.eval(states)
    if not model.config.tie_word_embeddings:
        del model.model.embed_tokens
    count = len(model.layers)
    while model.layers:
        layer = model.layers.pop(0)
        for index, (x, forward) in enumerate(zip(states, passes, strict=True)):
            states[index] = layer(x, forward)
            mx.eval(states[index], forward.shared)
        del layer
        mx.clear_cache()
        advance(1 / count)
    states = [model.norm(x)[0] for x in states]
    mx.eval(states)
    return model, states


def _sums(
    inputs: Sequence[mx.array],
    before: tuple[CausalLM, list[mx.array]],
    after: tuple[CausalLM, list[mx.array]],
    advance: Callable[[float], object],
) -> list[list[float]]:
    """For each input, sums over its predictions: two negative log-likelihoods, KL, same top-1."""
    found = []
    for input_ids, first, second in zip(inputs, before[1], after[1], strict=True):
        length = input_ids.shape[1] - 1  # the last token's successor is not in the window
        sums = [0.0] * 4
        for begin in range(0, length, HEAD_ROWS):
            rows = slice(begin, min(begin + HEAD_ROWS, length))
            p = log_softmax(before[0].head(first[rows]))  # [rows, vocab]
            q = log_softmax(after[0].head(second[rows]))
            target = input_ids[0, rows.start + 1 : rows.stop + 1, None]
            parts = (
                -mx.take_along_axis(p, target, axis=-1).sum(),
                -mx.take_along_axis(q, target, axis=-1).sum(),
                long_sum(mx.exp(p) * (p - q)).sum(),
                (mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)).sum(),
            )
            mx.eval(parts)
            sums = [total + float(part) for total, part in zip(sums, parts, strict=True)]
        found.append(sums)
        advance(1 / len(inputs))
    return found


def _agreement(windows: Windows, sums: Sequence[Sequence[float]]) -> Agreement:
    tokens = len(sums) * (windows.length - 1)
    before, after, divergence, same = (
        math.fsum(column) / tokens for column in zip(*sums, strict=True)
    )
    return Agreement(
        windows=len(sums),
        length=windows.length,
        long=windows.long,
        tokens=tokens,
        perplexity_before=_exp(before),
        perplexity_after=_exp(after),
        divergence=divergence,
        top1=same,
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def layer_errors(
    tensors: Sequence[tuple[TensorConversion, TensorConversion]], advance: Callable[[float], object]
) -> list[LayerError]:
    """The error of every weight matrix, read in blocks of rows.

    Args:
        tensors: from `paired_tensors`.
        advance: called with hundredths of this work.
    """
    matrices = [pair for pair in tensors if len(pair[0].shape) == 2]
    work = []
    for index, (before, _) in enumerate(matrices):
        count, width = before.shape
        height = max(1, BLOCK_NUMBERS // width)
        work += [(index, top, min(top + height, count)) for top in range(0, count, height)]
    differences, norms = [0.0] * len(matrices), [0.0] * len(matrices)
    first, second = (
        read_blocks(
            [RowBlock(matrices[n][side].tensors, top, end) for n, top, end in work], READ_AHEAD
        )
        for side in (0, 1)
    )
    for (index, *_), stored_before, stored_after in zip(work, first, second, strict=True):
        x, y = (
            tensor.transform.apply([_widened(array) for array in stored]).parts[
                tensor.transform.name
            ]
            for tensor, stored in zip(matrices[index], (stored_before, stored_after), strict=True)
        )
        difference, norm = sum_of_squares(y - x), sum_of_squares(x)
        mx.eval(difference, norm)
        differences[index] += float(difference)
        norms[index] += float(norm)
        mx.clear_cache()
        advance(100 / len(work))
    return [
        _layer_error(before, after, math.sqrt(difference / (norm or 1)))
        for (before, after), difference, norm in zip(matrices, differences, norms, strict=True)
    ]


def _layer_error(before: TensorConversion, after: TensorConversion, error: float) -> LayerError:
    name = before.transform.name
    path = name.removesuffix(".weight").removesuffix(".base_layer").split(".")
    return LayerError(
        name=name,
        layer=int(path[2]) if path[1:2] == ["layers"] else None,
        kind=part_of(name) or path[-1],
        error=error,
        bits_before=8 * before.nbytes / before.size,
        bits_after=8 * after.nbytes / after.size,
    )


def _widened(array: mx.array) -> mx.array:
    """Scales and biases in float32, in which a quantized layer multiplies them."""
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def paired_tensors(
    before: Checkpoint, after: Checkpoint
) -> list[tuple[TensorConversion, TensorConversion]]:
    """The same tensor in either folder, for all tensors, in the model's order.

    Raises:
        PhimlxError: where the two are not one model.
    """
    both = [
        {
            tensor.transform.name: tensor
            for tensor in TensorPlan.of(checkpoint, None, "float32").conversions
        }
        for checkpoint in (before, after)
    ]
    shapes = [{name: each.shape for name, each in tensors.items()} for tensors in both]
    configs = [build_model(checkpoint.config).config for checkpoint in (before, after)]
    folders = f"{before.folder} and {after.folder}"
    if configs[0].vocab_size != configs[1].vocab_size:
        sizes = " and ".join(f"{config.vocab_size:,}" for config in configs)
        raise PhimlxError(
            f"{folders} have different vocabularies, of {sizes} tokens: their logits cannot be "
            "compared."
        )
    if shapes[0] != shapes[1]:
        raise PhimlxError(
            f"{folders} are different models: their layers have different names or shapes."
        )
    order = dict(tree_flatten(build_model(before.config).parameters()))
    return [(both[0][name], both[1][name]) for name in order]
