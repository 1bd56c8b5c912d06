"""Every method's loss and gradients against torch's, from the papers; and what each needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors import safe_open

from phimlx.models.phi3 import Phi3Config, Phi3ForCausalLM
from phimlx.training.data.batches import Example
from phimlx.training.memory_estimate import LargestBatch, estimate_memory
from phimlx.training.methods import METHODS, NUMBERS
from phimlx.training.preference import BATCHES, STEPS, AnswerBatch, AnswerBatches, PairBatches
from phimlx.training.settings import TrainSettings
from phimlx.training.step import NonFiniteError
from phimlx.training.trainable import attach
from tests.training.test_step import Recorder

GOLDENS = Path(__file__).parents[1] / "goldens" / "preference.safetensors"
SEED, RANK, SCALE = 29, 2, 1.5
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}
SETTINGS: dict[str, float] = {
    "beta": 0.3,
    "gamma": 0.7,
    "lambda_": 0.4,
    "desirable_weight": 1.2,
    "undesirable_weight": 0.8,
}
LENGTHS = ((9, 11), (9, 6), (7, 8), (7, 5), (6, 4), (6, 3), (4, 5), (4, 2))
JUDGED = [name for name, method in METHODS.items() if method.rows in STEPS]


def data() -> list[Example]:
    """A better and a worse answer to a prompt in turn."""
    random = np.random.default_rng(SEED)
    found: list[Example] = []
    for place, (asked, answered) in enumerate(LENGTHS):
        prompt = random.integers(0, 40, asked) if place % 2 == 0 else found[-1].tokens[:asked]
        tokens = np.concatenate([prompt, random.integers(0, 40, answered)]).astype(np.int32)
        supervised = np.arange(len(tokens)) >= asked
        found.append(Example(tokens, supervised, f"row {place}", place % 2 == 0))
    return found


def before() -> Phi3ForCausalLM:
    """The model before training, with the weights that the goldens' maker drew."""
    model = Phi3ForCausalLM(Phi3Config.from_dict(SHAPE))
    shapes = {name: array.shape for name, array in dict(tree_flatten(model.parameters())).items()}
    random = np.random.default_rng(SEED + 1)
    drawn = {
        name: random.standard_normal(shapes[name]).astype(np.float32) * 0.25 + ("norm" in name)
        for name in sorted(shapes)
    }
    model.load_weights([(name, mx.array(value, mx.float32)) for name, value in drawn.items()])
    return model


def move(model: Phi3ForCausalLM, kind: str) -> None:
    """Put the model where the goldens' maker has trained it to."""
    random = np.random.default_rng(SEED + 2)
    trained = dict(tree_flatten(model.trainable_parameters()))
    if kind == "lora":
        moved = {
            name: mx.array(random.standard_normal(trained[name].shape).astype(np.float32) * 0.2)
            for name in sorted(trained)
        }
    else:
        moved = {
            name: trained[name]
            + mx.array(random.standard_normal(trained[name].shape).astype(np.float32) * 0.03)
            for name in sorted(trained)
        }
    model.load_weights(list(moved.items()), strict=False)


def prepared(kind: str) -> Phi3ForCausalLM:
    model = before()
    attach(model, TrainSettings(fine_tune_type=kind, rank=RANK, alpha=SCALE * RANK))
    return model


def goldens(method: str, kind: str) -> tuple[dict[str, float], dict[str, mx.array]]:
    with safe_open(GOLDENS, "np") as file:
        about = json.loads(file.metadata()["about"])[f"{method}/{kind}"]
        names = [name for name in sorted(file.keys()) if name.startswith(f"{method}/{kind}/")]
        return about, {name.split("/")[2]: mx.array(file.get_tensor(name)) for name in names}


def numbers(method: str) -> dict[str, float]:
    return {name: SETTINGS[name] for name in METHODS[method].numbers}


def check(recorder: Recorder, gradients: dict[str, mx.array]) -> None:
    assert gradients
    for name, gradient in gradients.items():
        scale = float(mx.abs(gradient).max())
        assert float(mx.abs(recorder.seen[name] - gradient).max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("method", JUDGED)
def test_loss_gradients_and_metrics_are_the_papers(method: str, kind: str, packed: bool) -> None:
    expected, gradients = goldens(method, kind)
    model, recorder = prepared(kind), Recorder()
    rows = METHODS[method].rows
    step = STEPS[rows](model, recorder, method, numbers(method))
    move(model, kind)
    length = 40 if packed else None
    batches = list(BATCHES[rows](data(), 8, row_length=length).epoch(0))
    assert len(batches) == 1
    result = step(1, batches)
    assert result.loss == pytest.approx(expected["loss"], rel=1e-5)
    for name, value in result.metrics.items():
        if name in expected:
            assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert set(result.metrics) == set(METHODS[method].metrics)
    check(recorder, gradients)
    assert step.evaluate(batches).loss == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("method", [name for name in JUDGED if METHODS[name].rows == "pairs"])
def test_pairs_may_be_spread_over_micro_batches_and_machines(method: str) -> None:
    expected, gradients = goldens(method, "full")
    model, recorder = prepared("full"), Recorder()
    step = STEPS["pairs"](model, recorder, method, numbers(method))
    move(model, "full")
    for options in ({}, {"row_length": 20}):
        result = step(1, list(PairBatches(data(), 1, seed=3, **options).epoch(0)))
        assert result.loss == pytest.approx(expected["loss"], rel=1e-5)
        check(recorder, gradients)
    halves = [
        batch
        for rank in (0, 1)
        for batch in PairBatches(data(), 3, row_length=24, rank=rank, ranks=2).epoch(0)
    ]
    assert step(1, halves).loss == pytest.approx(expected["loss"], rel=1e-5)
    check(recorder, gradients)


def test_only_a_method_that_compares_holds_the_weights_from_before() -> None:
    for method in JUDGED:
        rows = METHODS[method].rows
        full = STEPS[rows](prepared("full"), Recorder(), method, numbers(method))
        lora = STEPS[rows](prepared("lora"), Recorder(), method, numbers(method))
        assert (full.reference is not None) == METHODS[method].has_reference
        if lora.reference is not None and full.reference is not None:
            assert full.reference._weights
            assert not lora.reference._weights


def test_the_forecast_knows_who_holds_them() -> None:
    batch = LargestBatch(4, 64, 128)
    for method in JUDGED:
        for kind in ("lora", "full"):
            settings = TrainSettings(method=method, fine_tune_type=kind)
            estimate = estimate_memory(Phi3Config.from_dict(SHAPE), 10_000, settings, batch, 4)
            compares = METHODS[method].has_reference and kind == "full"
            weights: dict[str, mx.array] = dict(tree_flatten(before().parameters()))
            size = sum(array.size for array in weights.values())
            assert estimate.reference == (4 * size if compares else 0)


def test_an_answers_prompt_is_asked_beside_the_next_ones_answer() -> None:
    examples = data()
    for options in ({}, {"row_length": 40}):
        (batch,) = AnswerBatches(examples, 8, **options).epoch(0)
        assert isinstance(batch, AnswerBatch)
        others = {other.source: other for other in batch.mismatched.examples}
        for place, own in enumerate(examples):  # the longest first
            other, following = others[own.source], examples[(place + 1) % 8]
            assert other.tokens[~other.supervised].tolist() == own.tokens[~own.supervised].tolist()
            answer = following.tokens[following.supervised].tolist()
            assert other.tokens[other.supervised].tolist() == answer[: other.supervised.sum()]
            assert other.inputs <= max(each.inputs for each in examples)
    for batch in AnswerBatches(examples, 1).epoch(0):  # whose next one is in another batch
        assert isinstance(batch, AnswerBatch)
        (own,), (other,) = batch.examples, batch.mismatched.examples
        assert own.tokens.tolist() != other.tokens.tolist()


@pytest.mark.parametrize("method", ["simpo", "kto"])
def test_rows_that_make_no_number_are_named(method: str) -> None:
    model, examples = prepared("full"), data()
    for each in examples:
        each.tokens[each.tokens == 39] = 0
    examples[5].tokens[-2] = 39  # which the loss then depends on
    rows = METHODS[method].rows
    step = STEPS[rows](model, Recorder(), method, numbers(method))
    weight = np.array(model.model.embed_tokens.weight)
    weight[39] = np.inf
    model.model.embed_tokens.weight = mx.array(weight)
    with pytest.raises(NonFiniteError, match=r"the (loss|gradient) of row \d is"):
        step(2, list(BATCHES[rows](examples, 4).epoch(0)))


def test_a_certain_answer_makes_numbers() -> None:
    """Where float32 has no digits left of 1 − p, the odds have a bound."""
    model = prepared("full")
    step = STEPS["pairs"](model, Recorder(), "orpo", numbers("orpo"))
    weight = np.array(model.model.embed_tokens.weight) * 400
    model.model.embed_tokens.weight = mx.array(weight)
    tokens = np.full(6, 7, np.int32)
    same = Example(tokens, np.arange(6) >= 3)
    examples = [same, data()[1]]
    result = step(1, list(PairBatches(examples, 1).epoch(0)))
    assert np.isfinite(result.loss)


def test_every_number_has_a_setting_and_a_method() -> None:
    for name in NUMBERS:
        assert name in TrainSettings.model_fields
    settings: dict[str, Any] = {name: TrainSettings(method=name).numbers for name in METHODS}
    assert settings == {name: dict(method.numbers) for name, method in METHODS.items()}
