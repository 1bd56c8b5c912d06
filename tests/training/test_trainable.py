"""Where adapters go, that they begin as nothing, and that a step moves them alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phimlx.adapters.adapter import Base
from phimlx.errors import TrainingError
from phimlx.models import registry
from phimlx.models.phi3 import Phi3ForCausalLM
from phimlx.training.data.batches import Batches, Example
from phimlx.training.forward import Dropout
from phimlx.training.settings import TrainSettings
from phimlx.training.step import TrainingStep
from phimlx.training.trainable import adapter_of, attach, counts
from tests.training.models import tiny

IDS = mx.array([[5, 6, 7, 8, 9, 10]])
PROJECTIONS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
QUANTIZATIONS = {
    "4 bits": {"group_size": 32, "bits": 4},
    "3 bits": {"group_size": 32, "bits": 3},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}


def quantized(name: str | None = "4 bits", dtype: mx.Dtype = mx.float32) -> Phi3ForCausalLM:
    model = tiny()
    model.set_dtype(dtype)
    if name is not None:
        nn.quantize(model, **QUANTIZATIONS[name])
    return model


def trained(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.trainable_parameters()))


def data() -> Batches:
    drawn = np.random.default_rng(0).integers(3, 300, (8, 13)).astype(np.int32)
    examples = [Example(tokens, np.arange(13) > 3, f"row {i}") for i, tokens in enumerate(drawn)]
    return Batches(examples, 8)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quantization", [None, *QUANTIZATIONS])
def test_a_new_adapter_changes_nothing_and_a_step_moves_it_alone(
    kind: str, quantization: str | None
) -> None:
    model = quantized(quantization)
    before = model(IDS)
    frozen = dict(tree_flatten(model.parameters()))
    attach(model, TrainSettings(fine_tune_type=kind, rank=4))
    assert mx.allclose(model(IDS), before, rtol=0, atol=1e-5)
    parts = {name.rpartition(".")[2] for name in trained(model)}
    assert parts == ({"lora_a", "lora_b"} if kind == "lora" else {"lora_a", "lora_b", "m"})
    assert {array.dtype for array in trained(model).values()} == {mx.float32}
    step = TrainingStep(model, optim.Adam(1e-2))
    losses = [step(number, list(data().epoch(0))).loss for number in range(6)]
    assert losses[-1] < losses[0] - 0.5
    for name, array in dict(tree_flatten(model.parameters())).items():
        own = name.replace(".linear.", ".")
        assert name in trained(model) or mx.array_equal(array, frozen[own]), name


def test_adapters_are_float32_over_a_bfloat16_model() -> None:
    for kind in ("lora", "dora"):
        model = quantized(None, mx.bfloat16)
        attach(model, TrainSettings(fine_tune_type=kind))
        assert {array.dtype for array in trained(model).values()} == {mx.float32}
        assert model(IDS).dtype == mx.bfloat16


def test_the_seed_alone_decides_how_adapters_begin() -> None:
    def begun(seed: int) -> dict[str, mx.array]:
        mx.random.seed(np.random.default_rng().integers(1 << 30))
        model = tiny()
        attach(model, TrainSettings(seed=seed))
        return trained(model)

    first, again, other = begun(3), begun(3), begun(4)
    assert all(mx.array_equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if name.endswith("lora_a")]
    assert not any(mx.array_equal(first[name], other[name]) for name in drawn)
    assert not any(mx.array_equal(first[drawn[0]], first[name]) for name in drawn[1:4])
    # As mlx-lm draws: uniform up to 1 / √width.
    bounds = {name: first[name].shape[0] ** -0.5 for name in drawn}
    assert all(0.9 * b < float(mx.abs(first[name]).max()) <= b for name, b in bounds.items())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (TrainSettings(), [(0, p) for p in PROJECTIONS] + [(1, p) for p in PROJECTIONS]),
        (TrainSettings(num_layers=1), [(1, p) for p in PROJECTIONS]),
        (TrainSettings(layers=(0, 0), targets=("o_proj",)), [(0, "self_attn.o_proj")]),
        (
            TrainSettings(num_layers=1, targets=("self_attn.*", "down_*")),
            [(1, "self_attn.qkv_proj"), (1, "self_attn.o_proj"), (1, "mlp.down_proj")],
        ),
    ],
)
def test_targets_and_layers(settings: TrainSettings, expected: list[tuple[int, str]]) -> None:
    model = tiny()
    found = attach(model, settings)
    paths = {name.rpartition(".")[0] for name in trained(model)}
    assert paths == {f"model.layers.{number}.{name}" for number, name in expected}
    assert found.trained == sum(array.size for array in trained(model).values())


def test_what_is_counted_is_numbers_however_they_are_stored() -> None:
    plain = sum(array.size for array in dict(tree_flatten(tiny().parameters())).values())
    assert counts(quantized("4 bits")).total == counts(quantized("3 bits")).total == plain
    model = quantized("4 bits")
    found = attach(model, TrainSettings(rank=2, num_layers=1, targets=("o_proj",)))
    assert (found.trained, found.total) == (2 * (64 + 64), plain + 2 * (64 + 64))


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        (TrainSettings(), 2.0),
        (TrainSettings(alpha=320.0), 20.0),
        (TrainSettings(rank=4, alpha=6), 1.5),
        (TrainSettings(rank=4, alpha=6, rslora=True), 3.0),
    ],
)
def test_scale(settings: TrainSettings, scale: float) -> None:
    model = tiny()
    attach(model, settings)
    assert model.layers[0].mlp.down_proj.scale == scale
    assert {layer.scale for layer in adapter_of(model, settings).layers.values()} == {scale}


def test_dropout_is_the_one_that_takes_keys_and_none_where_there_is_none() -> None:
    model = tiny()
    attach(model, TrainSettings(dropout=0.25))
    assert {m.dropout.p for m in model.modules() if "lora_a" in m} == {0.25}
    assert all(isinstance(m.dropout, Dropout) for m in model.modules() if "lora_a" in m)
    model = tiny()
    attach(model, TrainSettings())
    assert not any(isinstance(m, Dropout | nn.Dropout) for m in model.modules())


def test_full_fine_tuning_trains_all_or_the_last_layers() -> None:
    model = tiny()
    names = set(dict(tree_flatten(model.parameters())))
    attach(model, TrainSettings(fine_tune_type="full"))
    assert set(trained(model)) == names
    attach(model, TrainSettings(fine_tune_type="full", num_layers=1))
    last = {name for name in names if name.startswith("model.layers.1.")}
    assert set(trained(model)) == last
    assert set(adapter_of(model, TrainSettings(fine_tune_type="full")).weights) == last


def test_an_adapter_is_what_was_trained() -> None:
    settings = TrainSettings(rank=4, seed=1)
    model = tiny()
    attach(model, settings)
    TrainingStep(model, optim.Adam(1e-2))(0, list(data().epoch(0)))
    adapter = adapter_of(model, settings, Base("nano", "1234"))
    assert (adapter.base, adapter.blocks, adapter.kind) == (Base("nano", "1234"), 2, "lora")
    arrays = trained(model)
    assert adapter.arrays.keys() == arrays.keys()
    assert all(mx.array_equal(arrays[name], array) for name, array in adapter.arrays.items())


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        (
            TrainSettings(targets=("lm_head",)),
            "There is no projection 'lm_head' to train; there is qkv_proj, o_proj, gate_up_proj, "
            "down_proj.",
            None,
        ),
        (
            TrainSettings(targets=("o_proj", "v_proj")),
            "There is no projection 'v_proj' to train; there is qkv_proj, o_proj, gate_up_proj, "
            "down_proj.",
            "v_proj is part of qkv_proj here.",
        ),
        (
            TrainSettings(num_layers=3),
            "num_layers is 3, but this model has 2 layers, 0 to 1.",
            None,
        ),
        (
            TrainSettings(layers=(1, 2)),
            "layers is [1, 2], but this model has 2 layers, 0 to 1.",
            None,
        ),
        (
            TrainSettings(fine_tune_type="full", targets=("o_proj",)),
            "targets goes with lora and dora: full fine-tuning trains whole layers.",
            None,
        ),
        (
            TrainSettings(fine_tune_type="full"),
            "This model is quantized; full fine-tuning needs one that is not.",
            "Use lora or dora, or make plain weights of it: phimlx convert MODEL --mlx-path OUT "
            "--dequantize",
        ),
    ],
)
def test_what_this_model_cannot_do(settings: TrainSettings, message: str, hint: str | None) -> None:
    with pytest.raises(TrainingError) as caught:
        attach(quantized(), settings)
    assert (str(caught.value), caught.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("options", "held", "message"),
    [
        ({"fine_tune_type": "full"}, {"image"}, "Full fine-tuning changes what all rows share"),
        ({"train": ("vision-adapter",)}, {"text"}, "No row holds a picture, so that the vision"),
        ({"train": ("speech-adapter",)}, {"image"}, "No row holds a sound without a picture, so"),
        ({"train": ("projector",)}, {"text"}, "No row holds a picture or a sound without a pict"),
        ({"dropout": 0.1}, {"image"}, "dropout goes with a new adapter"),
        ({"fine_tune_type": "dora"}, {"audio"}, "dora goes with a new adapter"),
    ],
)
def test_what_a_model_with_adapters_of_its_own_cannot_do(
    options: dict[str, Any], held: set[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    monkeypatch.setattr(type(model), "architecture", registry.find("phi4mm"))
    with pytest.raises(TrainingError) as caught:
        attach(model, TrainSettings(**options), held)
    assert str(caught.value).startswith(message)


def test_a_model_without_says_that_it_has_none() -> None:
    with pytest.raises(TrainingError) as caught:
        attach(tiny(), TrainSettings(train=("vision-adapter",)))
    assert str(caught.value) == "The model has no vision-adapter to train."
