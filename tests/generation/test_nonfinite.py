"""A model that computes no numbers says so, and what helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import phimlx
from phimlx.errors import GenerationError
from phimlx.evaluation.data import measure_loss
from phimlx.evaluation.lm_eval import _hidden_states
from phimlx.generation.engine import Engine
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.models.base import CausalLM
from phimlx.training.data.batches import Example
from tests.training.models import tiny


def request_of(prompt: list[int], temperature: float = 0.0) -> Request:
    return Request(prompt, Sampler(Sampling(temperature=temperature), 0), 6)


def poison(model: CausalLM, value: float) -> None:
    weight = model.model.layers[1].mlp.down_proj.weight
    model.model.layers[1].mlp.down_proj.weight = weight.at[3, 4].add(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_finite_are_named(value: float, temperature: float) -> None:
    model = tiny()
    poison(model, value)
    with pytest.raises(GenerationError) as caught:
        list(Engine(model).run(request_of([5, 6], temperature)))
    assert str(caught.value) == (
        "The model computes no numbers in float32: its weights hold some that are not finite, the "
        "first in model.layers.1.mlp.down_proj.weight."
    )
    assert caught.value.hint == "Convert it again from its source, or download it again."


def overflowing() -> CausalLM:
    """Finite weights whose products pass float16's largest number, in the second layer."""
    model = tiny()
    model.set_dtype(mx.float16)
    for name in ("gate_up_proj", "down_proj"):
        layer = model.model.layers[1].mlp[name]
        layer.weight = layer.weight * 4000
    return model


def test_a_layer_that_overflows_is_named() -> None:
    model = overflowing()
    with pytest.raises(GenerationError) as caught:
        list(Engine(model).run(request_of([5, 6])))
    assert str(caught.value) == (
        "The model computes no numbers in float16: what model.layers.1 puts out is not finite."
    )
    assert caught.value.hint is not None
    assert "--dtype float32" in caught.value.hint
    model.set_dtype(mx.float32)
    request = request_of([5, 6])
    list(Engine(model).run(request))
    assert len(request.reply.tokens) == 6


def test_only_the_row_that_is_drawn_from_counts() -> None:
    """One token is poison: those who never meet it get their replies, in a batch too."""
    model = tiny(tied=False)
    weight = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = weight.at[299].add(float("nan"))
    alone = request_of([5, 6])
    list(Engine(model).run(alone))
    engine = Engine(model)
    requests = [request_of([5, 6]), request_of([5, 299])]
    engine.add(*requests)
    while not all(request.finished for request in requests):
        engine.step()
    assert requests[0].reply.tokens == alone.reply.tokens
    assert requests[0].error is None
    assert isinstance(requests[1].error, GenerationError)
    assert requests[1].reply.tokens == []
    with pytest.raises(GenerationError):
        engine.run_all([request_of([5, 6]), request_of([5, 299])])


@pytest.mark.parametrize("ask", ["generate", "stream", "generate_all"])
def test_a_model_folder_says_so_however_it_is_asked(data: Path, ask: str) -> None:
    folder = data.parent / "cases" / "nan-logits" / "model"
    if not folder.is_dir():
        pytest.skip("the case nan-logits is not beside the test data")
    phi = phimlx.load(folder)
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: phi.generate("What is 3 + 4?"),
        "stream": lambda: next(phi.stream("What is 3 + 4?")),
        "generate_all": lambda: phi.generate_all(["What is 3 + 4?"], max_tokens=4),
    }
    with pytest.raises(GenerationError, match="computes no numbers in float16"):
        calls[ask]()


def test_evaluation_says_so_too() -> None:
    model = tiny()
    poison(model, float("nan"))
    tokens = np.array([5, 6, 7, 8], np.int32)
    example = Example(tokens, np.array([False, True, True, True]), "rows.jsonl, line 1")
    with pytest.raises(GenerationError, match="computes no numbers in float32"):
        measure_loss(model, [example])
    with pytest.raises(GenerationError, match="computes no numbers in float32"):
        _hidden_states(model, tokens[None], None, model.make_cache())
