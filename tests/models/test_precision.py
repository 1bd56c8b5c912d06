"""Half precision and quantized weights: finite, and the likeliest token where it is clear.

The reference's own goldens in these forms are in `test_reference.py`; here it is real text on the
bundled model, in both LongRoPE regimes.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from phimlx.checkpoint.folder import DTYPES, Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.evaluation.bundled import questions
from phimlx.hub.resolve import NANO
from phimlx.models.base import CausalLM
from phimlx.prompt.tokenizer.tokenizer import Tokenizer

# Rounding to bfloat16 moves a number by up to 2^-9 of itself; what some twenty such roundings a
# layer add up to stays below this share of the largest logit.
BFLOAT16_ROUNDING = 2**-5


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(Checkpoint(NANO), mx.float32)


@pytest.fixture(scope="module", params=["short", "long"])
def ids(request: pytest.FixtureRequest, model: CausalLM) -> mx.array:
    """Held-out text, `[1, length]`: as long as the step, or twice that."""
    text = "".join(
        f"<|{message['role']}|>{message['content']}<|end|>"
        for question in questions()
        for message in question.messages
    )
    step = model.config.rope.original_max_position_embeddings
    tokens = Tokenizer.load(NANO).encode(text, control=True)
    return mx.array([tokens[: step if request.param == "short" else 2 * step]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_where_the_margin_is_clear(
    model: CausalLM, ids: mx.array, dtype: str
) -> None:
    exact = model(ids)[0]  # [length, vocab]
    half = load_model(Checkpoint(NANO), DTYPES[dtype])(ids)[0].astype(mx.float32)
    assert mx.isfinite(half).all().item()
    best, second = mx.sort(exact, axis=-1)[:, -1], mx.sort(exact, axis=-1)[:, -2]
    clear = best - second > BFLOAT16_ROUNDING * mx.abs(exact).max()
    assert clear.sum().item() > 20
    agree = half.argmax(axis=-1) == exact.argmax(axis=-1)
    assert mx.where(clear, agree, True).all().item()


@pytest.mark.slow
def test_quantized_logits_are_finite_and_closer_with_more_bits(
    model: CausalLM, ids: mx.array
) -> None:
    exact = model(ids)
    differences = []
    for bits in (2, 3, 4, 5, 6, 8):
        packed = load_model(Checkpoint(NANO), mx.float32)
        nn.quantize(packed, group_size=64, bits=bits)
        logits = packed(ids)
        assert mx.isfinite(logits).all().item()
        differences.append(mx.abs(logits - exact).mean().item() / mx.abs(exact).mean().item())
    assert differences == sorted(differences, reverse=True)
    assert differences[-1] < 0.03
