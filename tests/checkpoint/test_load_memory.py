"""Weights are read once, into the memory that they stay in, where their dtype stays."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model, map_model
from phimlx.hub.resolve import NANO
from phimlx.models.base import CausalLM


def nbytes(model: CausalLM) -> int:
    parameters: Any = tree_flatten(model.parameters())
    return sum(array.nbytes for _, array in parameters)


@pytest.mark.parametrize("dtype", [None, mx.bfloat16], ids=["as stored", "the same"])
def test_loading_takes_the_weights_alone(dtype: mx.Dtype | None) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(Checkpoint(NANO), dtype)
    assert mx.get_peak_memory() - before < 1.02 * nbytes(model)
    assert mx.get_active_memory() - before < 1.02 * nbytes(model)


def test_another_dtype_takes_little_more_than_itself() -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(Checkpoint(NANO), mx.float16)
    assert mx.get_active_memory() - before < 1.02 * nbytes(model)
    assert mx.get_peak_memory() - before < 1.6 * nbytes(model)


def test_mapped_weights_are_not_read_before_they_are_used() -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    model = map_model(Checkpoint(NANO))
    assert mx.get_active_memory() - before < 0.01 * nbytes(model)
    mx.eval(model.norm(mx.zeros((1, 1, model.config.hidden_size))))
    assert mx.get_active_memory() - before < 0.01 * nbytes(model)
