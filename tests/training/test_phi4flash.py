"""Training a model with states: rows of several examples, adapters, and its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import TrainingError
from phimlx.models.base import CausalLM
from phimlx.training.data.batches import Batches
from phimlx.training.memory_estimate import LargestBatch, estimate_memory
from phimlx.training.settings import TrainSettings
from phimlx.training.step import TrainingStep
from phimlx.training.trainable import adapter_of, attach
from tests.training.test_step import WAYS, Recorder, examples, plain

LENGTHS = (5, 17, 16, 40, 12, 60)  # the window is 16


@pytest.fixture
def model(data: Path) -> CausalLM:
    model = load_model(Checkpoint(data / "tiny" / "tiny-phi4flash"))
    model.train()
    return model


@pytest.mark.parametrize("way", ["padded", "packed", "packed, checkpointed", "packed, accumulated"])
def test_loss_and_gradients_equal_those_of_each_example_alone(model: CausalLM, way: str) -> None:
    """Neither state, convolution, window nor memory reaches from one example into the next."""
    options = {"batch_size": 8, **WAYS[way]}
    checkpointing = options.pop("checkpointing", False)
    data, recorder = examples(LENGTHS), Recorder()
    loss, gradients = plain(model, data)  # type: ignore[arg-type]
    batches = list(Batches(data, seed=0, **options).epoch(0))
    result = TrainingStep(model, recorder, checkpointing=checkpointing)(1, batches)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert recorder.seen.keys() == gradients.keys()
    for name, expected in gradients.items():
        found = recorder.seen[name]
        scale = float(mx.abs(expected).max())
        assert float(mx.abs(found - expected).max()) <= 2e-4 * scale + 1e-7, name


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_sit_on_the_projections_that_each_layer_has(model: CausalLM, kind: str) -> None:
    attach(model, TrainSettings(fine_tune_type=kind, num_layers=-1, rank=2))
    layers = adapter_of(model, TrainSettings()).layers
    own = ["attn.Wqkv", "attn.in_proj", "attn.x_proj", "attn.dt_proj", "attn.out_proj"]
    found = [[name for name in own if f"model.layers.{n}.{name}" in layers] for n in range(8)]
    mamba, attention, gate = own[1:], [own[0], own[4]], [own[1], own[4]]
    assert found == [mamba, attention, mamba, attention, mamba, attention, gate, attention]
    assert all(
        f"model.layers.{n}.mlp.{name}" in layers for n in range(8) for name in ("fc1", "fc2")
    )


def test_layers_without_a_projection_have_nothing_to_train(model: CausalLM) -> None:
    settings = TrainSettings(num_layers=2, targets=["x_proj"])
    with pytest.raises(TrainingError) as caught:
        attach(model, settings)
    assert str(caught.value) == "No projection of those in targets is in layers 6 to 7."
    assert caught.value.hint == "Train more layers, or other projections."


@pytest.mark.parametrize(
    "options",
    [{"num_layers": -1}, {"num_layers": 3}, {"num_layers": -1, "targets": ["x_proj", "fc1"]}],
)
def test_the_forecast_counts_what_is_trained(model: CausalLM, options: dict[str, Any]) -> None:
    """Layer by layer, as each has other projections."""
    settings = TrainSettings(rank=4, **options)
    estimate = estimate_memory(model.config, 0, settings, LargestBatch(2, 64, 128), 4)
    assert estimate.trained == 4 * attach(model, settings).trained
