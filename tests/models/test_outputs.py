"""Hidden states of the last tokens alone are those of all tokens, at their places."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phimlx.checkpoint.load import build_model
from phimlx.generation.prefill import prefill
from phimlx.models.base import CausalLM
from scripts.bench.operations import SHAPES

PHI = {
    "model_type": "phi", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64,
    "num_attention_heads": 2, "max_position_embeddings": 512, "layer_norm_eps": 1e-5,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    **SHAPES,
    "windowed": {**SHAPES["phi-4"], "sliding_window": 4},
    "phi": PHI,
}
LENGTH = 9


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> CausalLM:
    mx.random.seed(0)
    return build_model({**CONFIGS[request.param], "num_hidden_layers": 2})


def close(one: mx.array, other: mx.array) -> bool:
    return one.shape == other.shape and bool(mx.allclose(one, other, rtol=0, atol=1e-5).item())


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_of_a_pass(model: CausalLM, padded: bool) -> None:
    ids = mx.random.randint(0, 64, (2, LENGTH), key=mx.random.key(1))
    mask = None
    if padded:
        mask = mx.ones((2, LENGTH), mx.int32)
        mask[0, :3] = 0
    whole = model.hidden_states(ids, attention_mask=mask)
    for outputs in (1, 2, LENGTH):
        alone = model.hidden_states(ids, attention_mask=mask, outputs=outputs)
        assert close(alone, whole[:, -outputs:])


def test_behind_a_cache_that_goes_on(model: CausalLM) -> None:
    ids = mx.random.randint(0, 64, (1, LENGTH), key=mx.random.key(1))
    whole = model.hidden_states(ids)
    cache = model.make_cache()
    model.hidden_states(ids[:, :4], cache, outputs=1)
    middle = model.hidden_states(ids[:, 4:8], cache, outputs=2)
    assert close(middle, whole[:, 6:8])
    assert cache.length == 8
    assert close(model.hidden_states(ids[:, 8:], cache), whole[:, 8:])


def test_of_pieces(model: CausalLM) -> None:
    ids = np.random.default_rng(0).integers(0, 64, (1, LENGTH))
    whole = model.hidden_states(mx.array(ids))
    pieces = list(prefill(model, ids, model.make_cache(), size=4, outputs=1))
    assert [piece.shape[1] for piece in pieces] == [1, 1, 1]
    assert close(mx.concatenate(pieces, axis=1), whole[:, mx.array([3, 7, 8])])


def test_what_crosses_the_step_is_computed_whole() -> None:
    config = {**SHAPES["phi-4-mini"], "num_hidden_layers": 2}
    model = build_model({**config, "original_max_position_embeddings": 6})
    ids = mx.random.randint(0, 64, (1, LENGTH), key=mx.random.key(1))
    cache = model.make_cache()
    model.hidden_states(ids[:, :5], cache)
    assert close(model.hidden_states(ids[:, 5:], cache), model.hidden_states(ids)[:, 5:])
