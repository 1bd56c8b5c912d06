"""GPTQ over a whole model: which inputs each layer sees, and what it leaves alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from convert import Quantization
from convert.folder import Journal
from convert.measure import compare
from convert.quantize import dwq, layerwise
from convert.quantize.layerwise import calibration_files, quantize_layer_by_layer
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model, map_model
from phimlx.hub.resolve import NANO
from phimlx.models.base import CausalLM, ForwardPass
from phimlx.models.phi3 import DecoderLayer
from tests.convert.tiny import PHI_4, write_model

FOUR = Quantization(32, 4)
DEEP = {**PHI_4, "num_hidden_layers": 3}
WINDOWS = [tuple((5 * n + k * k) % 48 for k in range(24)) for n in range(3)] + [tuple(range(40))]


class SharingLayer(DecoderLayer):
    """The first hands its output on, and every later one adds a part of it to its own."""

    def __call__(self, x: mx.array, forward: ForwardPass) -> mx.array:
        y = super().__call__(x, forward)
        if "first" not in forward.shared:
            forward.shared["first"] = {"output": y}
            return y
        return y + 0.5 * forward.shared["first"]["output"]


def sharing(model: CausalLM) -> CausalLM:
    for layer in model.layers:
        layer.__class__ = SharingLayer
    return model


def run_layerwise(
    folder: Path, forms: dict[str, Quantization | None], journal: Path, advance: Any = None
) -> dict[str, mx.array]:
    journal.mkdir()
    return quantize_layer_by_layer(
        Checkpoint(folder),
        forms,
        WINDOWS,
        mx.float32,
        Journal(journal, "plan", 0),
        advance or (lambda percent: None),
    )


def forms_of(folder: Path) -> dict[str, Quantization | None]:
    modules = load_model(Checkpoint(folder)).named_modules()
    return {path: None for path, module in modules if hasattr(module, "to_quantized")}


@pytest.mark.parametrize("shares", [False, True])
def test_hessians_are_of_what_the_layer_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    source = write_model(tmp_path / "m", DEEP)
    model = load_model(Checkpoint(source), mx.float32)
    hessians = []

    def record(weight: mx.array, hessian: mx.array, *others: Any) -> tuple[mx.array, ...]:
        hessians.append(hessian)
        return tuple(mx.quantize(weight, 32, 4))

    monkeypatch.setattr(layerwise, "gptq_quantize", record)
    if shares:
        sharing(model)
        monkeypatch.setattr(layerwise, "map_model", lambda found: sharing(map_model(found)))
    path = "model.layers.2.self_attn.qkv_proj"
    tensors = run_layerwise(source, {**forms_of(source), path: FOUR}, tmp_path / "j")
    assert tensors.keys() == {f"{path}.{name}" for name in ("weight", "scales", "biases")}
    expected = mx.zeros((64, 64))
    for window in WINDOWS:
        ids = mx.array([window])
        x, forward = model.embed(ids), model.forward_pass(ids)
        for layer in model.layers[:2]:
            x = layer(x, forward)
        rows = model.layers[2].input_layernorm(x)[0]
        expected = expected + rows.T @ rows
    assert len(hessians) == 1
    assert mx.allclose(hessians[0], expected, rtol=1e-3, atol=1e-2)


def test_what_layers_hand_on_reaches_measurement_and_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(write_model(tmp_path / "m", DEEP))
    model = sharing(load_model(checkpoint, mx.float32))
    ids = [mx.array([window]) for window in WINDOWS]
    expected = [model.hidden_states(each)[0] for each in ids]
    monkeypatch.setattr(compare, "map_model", lambda found: sharing(map_model(found)))
    _, states = compare.hidden_states(checkpoint, ids, lambda part: None)
    for found, wanted in zip(states, expected, strict=True):
        assert mx.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    student = dwq.ReweightedModel(model)
    path = "model.layers.0.mlp.down_proj"
    layer = model.layers[0].mlp.down_proj

    def plain(weight: mx.array) -> mx.array:
        layer.weight = weight
        return model(ids[0]).square().mean()

    weight = layer.weight
    wanted = mx.grad(plain)(weight)
    loss = lambda parameters: student(parameters, ids[0]).square().mean()  # noqa: E731
    found = mx.grad(loss)({path: weight})[path]
    assert mx.allclose(found, wanted, rtol=1e-4, atol=1e-6 * mx.abs(wanted).max())


def test_projections_are_in_the_order_of_their_calls() -> None:
    """As the record of the architecture says, and in no other."""
    model = load_model(Checkpoint(NANO), mx.float32)
    called: list[int] = []
    modules = {id(module): path for path, module in model.layers[0].named_modules()}
    call = nn.Linear.__call__

    def record(linear: Any, x: mx.array) -> mx.array:
        called.append(id(linear))
        return call(linear, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "__call__", record)
        ids = mx.array([[1, 2, 3]])
        model.layers[0](model.embed(ids), model.forward_pass(ids))
    assert tuple(modules[each] for each in called) == model.architecture.projections


def test_a_process_stays_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "m", PHI_4)

    def state() -> tuple[Any, ...]:
        return sys.stdout, sys.stderr, DecoderLayer.__call__, np.random.get_state()[1].tobytes()

    before, during = state(), set()

    def advance(percent: float) -> None:
        during.add(state() == before)

    forms = dict.fromkeys(forms_of(source), FOUR)
    tensors = run_layerwise(source, forms, tmp_path / "j", advance)
    assert during == {True}
    assert state() == before
    assert capfd.readouterr() == ("", "")
    model = load_model(Checkpoint(source))
    linear = {path for path, module in model.named_modules() if type(module).__name__ == "Linear"}
    assert {name.rpartition(".")[0] for name in tensors} == linear
    assert {file.name for file in (tmp_path / "j").iterdir()} == {
        ".journal.json",
        *calibration_files(model),
    }
    assert all(mx.all(mx.isfinite(array)) for array in tensors.values())
