"""Adapters of split projections beside fused ones: PEFT's logits, mlx-lm's form, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from convert import convert
from convert.export.adapter import export_adapter
from phimlx.adapters.adapter import Adapter
from phimlx.adapters.attach import load_adapter
from phimlx.adapters.mlx_lm import write_adapter
from phimlx.adapters.read import read_adapter
from phimlx.adapters.split import fused
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import CheckpointError
from phimlx.models.lora import LoRA

GOLDENS = Path(__file__).parents[1] / "goldens"
SPLIT, LLAMA = GOLDENS / "peft-split", GOLDENS / "models" / "llama"
NAMES = ("all", "some", "patterns", "dora", "dora-some")
ATTENTION = "model.layers.1.self_attn"
SIZES = {"q_proj": 64, "k_proj": 32, "v_proj": 32}


def golden(name: str) -> mx.array:
    arrays = mx.load(str(SPLIT / "logits.safetensors"))
    assert isinstance(arrays, dict)
    return arrays[name]


def logits(adapter: Adapter | Path, folder: Path = LLAMA, bits: int | None = None) -> mx.array:
    model = load_model(Checkpoint(folder), mx.float32)
    if bits is not None:
        nn.quantize(model, 32, bits)
    load_adapter(model, adapter)
    return model(golden("input_ids"))


def lora(rank: int, rows: int, scale: float = 2.0, width: int = 64) -> LoRA:
    mx.random.seed(rank + rows)
    return LoRA(mx.random.normal((width, rank)), mx.random.normal((rank, rows)) * 0.1, scale)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_peft(name: str) -> None:
    expected = golden(name)
    assert mx.abs(expected - golden("base")).max() > 0.3
    largest = mx.abs(expected).max()
    assert mx.abs(logits(SPLIT / name) - expected).max() <= 1e-5 * largest


@pytest.mark.parametrize("name", NAMES)
def test_fused_into_the_weights_it_is_the_same(name: str, tmp_path: Path) -> None:
    convert(LLAMA, tmp_path / "out", dtype="float32", adapter=SPLIT / name)
    found = load_model(Checkpoint(tmp_path / "out"))(golden("input_ids"))
    assert mx.abs(found - golden(name)).max() <= 1e-5 * mx.abs(golden(name)).max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", ["peft", "mlx-lm"])
def test_for_a_fused_model_it_goes_out_fused(name: str, format: str, tmp_path: Path) -> None:
    """Where the model is given; without it the names stay as they are."""
    export_adapter(SPLIT / name, tmp_path / "fused", format, LLAMA)
    kept = read_adapter(tmp_path / "fused")
    assert all("qkv_proj" in path or "q_proj" not in path for path in kept.layers)
    assert mx.allclose(logits(kept), logits(SPLIT / name), rtol=1e-4, atol=1e-4)
    export_adapter(SPLIT / name, tmp_path / "split", format)
    assert mx.allclose(logits(tmp_path / "split"), logits(SPLIT / name), rtol=1e-4, atol=1e-4)


def test_beside_quantized_weights() -> None:
    model = load_model(Checkpoint(LLAMA), mx.float32)
    nn.quantize(model, 32, 8)
    whole = fused(read_adapter(SPLIT / "dora-some"), model)
    layer = whole.layers[f"{ATTENTION}.qkv_proj"]
    module = dict(model.named_modules())[f"{ATTENTION}.qkv_proj"]
    plain = mx.dequantize(module.weight, module.scales, module.biases, group_size=32, bits=8)
    assert layer.magnitude is not None
    assert mx.allclose(layer.magnitude[:64], mx.linalg.norm(plain[:64], axis=1), rtol=1e-6)
    expected = golden("dora-some")
    assert mx.abs(logits(whole, bits=8) - expected).max() <= 0.05 * mx.abs(expected).max()


def test_mlx_lm_s_form(tmp_path: Path) -> None:
    """Against weights that are merged piece by piece."""
    layers = {f"{ATTENTION}.{name}": lora(4, rows) for name, rows in SIZES.items()}
    layers |= {"model.layers.0.mlp.up_proj": lora(4, 96)}
    write_adapter(tmp_path, Adapter(layers, blocks=2))
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert f"{ATTENTION}.q_proj" in about["lora_parameters"]["keys"]
    model = load_model(Checkpoint(LLAMA), mx.float32)
    weights = dict(tree_flatten(model.parameters()))
    qkv = mx.concatenate([layers[f"{ATTENTION}.{name}"].delta() for name in SIZES])
    weights[f"{ATTENTION}.qkv_proj.weight"] += qkv
    up = layers["model.layers.0.mlp.up_proj"].delta()
    weights["model.layers.0.mlp.gate_up_proj.weight"][96:] += up
    model.load_weights(list(weights.items()))
    expected = model(golden("input_ids"))
    assert mx.allclose(logits(tmp_path), expected, rtol=1e-4, atol=1e-4)


def test_full_fine_tuning_of_split_weights() -> None:
    model = load_model(Checkpoint(LLAMA), mx.float32)
    own = dict(tree_flatten(model.parameters()))[f"{ATTENTION}.qkv_proj.weight"]
    keys = mx.random.normal((32, 64)) * 0.1
    whole = fused(Adapter(weights={f"{ATTENTION}.k_proj.weight": keys}), model)
    expected = mx.concatenate([own[:64], keys, own[96:]])
    assert whole.weights.keys() == {f"{ATTENTION}.qkv_proj.weight"}
    assert mx.array_equal(whole.weights[f"{ATTENTION}.qkv_proj.weight"], expected)
    nn.quantize(model, 32, 4)
    with pytest.raises(CheckpointError, match="rows beside it are quantized"):
        fused(Adapter(weights={f"{ATTENTION}.k_proj.weight": keys}), model)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {"k_proj": lora(2, 64)},
            "The adapter was made for another model: model.layers.1.self_attn.k_proj.lora_b has "
            "shape [2, 64], and this one needs [2, 32].",
        ),
        (
            {"k_proj": lora(2, 32), "qkv_proj": lora(2, 128)},
            "The adapter changes model.layers.1.self_attn.qkv_proj, and "
            "model.layers.1.self_attn.k_proj in it too.",
        ),
        (
            {"q_proj": lora(2, 64, width=48), "k_proj": lora(2, 32)},
            "The adapter's model.layers.1.self_attn.q_proj, model.layers.1.self_attn.k_proj take "
            "inputs of other widths.",
        ),
        (
            {"q_proj": lora(2, 64, width=48)},
            "The adapter was made for another model: model.layers.1.self_attn.qkv_proj.lora_a has "
            "shape [48, 2], and this one needs [64, 2].",
        ),
    ],
)
def test_what_does_not_fit(layers: dict[str, Any], message: str) -> None:
    adapter = Adapter({f"{ATTENTION}.{name}": layer for name, layer in layers.items()})
    with pytest.raises(CheckpointError) as caught:
        logits(adapter)
    assert str(caught.value) == message


def test_one_of_fused_projections_stays_as_it_is() -> None:
    model = load_model(Checkpoint(LLAMA), mx.float32)
    adapter = Adapter({f"{ATTENTION}.qkv_proj": lora(2, 128), f"{ATTENTION}.o_proj": lora(2, 64)})
    assert fused(adapter, model) == adapter


def test_biases_of_some_pieces() -> None:
    """As PEFT's `lora_bias` has them: one that B adds, scaled as B is."""
    added = {"q_proj": mx.ones(64), "v_proj": mx.full((32,), 2.0)}
    layers = {
        f"{ATTENTION}.q_proj": replace(lora(2, 64, scale=2.0), bias=added["q_proj"]),
        f"{ATTENTION}.k_proj": lora(2, 32, scale=1.0),
        f"{ATTENTION}.v_proj": replace(lora(2, 32, scale=3.0), bias=added["v_proj"]),
    }
    model = load_model(Checkpoint(LLAMA), mx.float32)
    whole = fused(Adapter(layers), model).layers[f"{ATTENTION}.qkv_proj"]
    assert whole.bias is not None
    expected = mx.concatenate([2 * mx.ones(64), mx.zeros(32), 6 * mx.ones(32)])
    assert mx.allclose(whole.bias * whole.scale, expected)
    pieces = mx.concatenate([layers[f"{ATTENTION}.{name}"].delta() for name in SIZES])
    assert mx.allclose(whole.delta(), pieces, atol=1e-6)


def test_what_pissa_began_with_is_not_known_here() -> None:
    adapter = Adapter({f"{ATTENTION}.q_proj": lora(2, 64)}, start="pissa")
    with pytest.raises(CheckpointError) as caught:
        logits(adapter)
    assert str(caught.value) == (
        "The adapter began with what pissa took out of the weights of "
        "model.layers.1.self_attn.q_proj, which this model has in one."
    )
