"""Sources that are quantized already: quantized further, or made plain again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from convert import Quantization, Recipe
from convert import convert as convert_model
from convert import plan as plan_module
from convert.quantize.recipe import Rule
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from tests.convert.tiny import MINI, PHI_4, parameters, same_bits, weights_of, write_model

MODES = [Quantization(32, 6), Quantization(32, 8, "mxfp8"), Quantization(16, 4, "nvfp4")]


def dequantized(folder: Path) -> dict[str, mx.array]:
    """What MLX itself makes of an MLX folder."""
    model = load_model(Checkpoint(folder))
    weights = dict(tree_flatten(model.parameters()))
    for path, layer in model.named_modules():
        if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
            biases = weights.pop(f"{path}.biases", None)
            weights[f"{path}.weight"] = mx.dequantize(
                layer.weight,
                weights.pop(f"{path}.scales"),
                biases,
                layer.group_size,
                layer.bits,
                layer.mode,
            )
    return weights


@pytest.fixture(params=MODES, ids=str)
def quantized(request: Any, tmp_path: Path) -> Path:
    source = write_model(tmp_path / "source", MINI, parameters(MINI, mx.bfloat16))
    return convert_model(source, tmp_path / "quantized", request.param).path


def test_dequantized_as_mlx_does_it(quantized: Path, tmp_path: Path) -> None:
    result = convert_model(quantized, tmp_path / "out", dequantize=True)
    assert same_bits(weights_of(tmp_path / "out"), dequantized(quantized))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == result.dtype == "bfloat16"
    assert "quantization" not in config
    assert "quantization_config" not in config
    assert result.bits_per_weight == 16


def test_dequantized_to_another_type(quantized: Path, tmp_path: Path) -> None:
    convert_model(quantized, tmp_path / "out", dtype="float32", dequantize=True)
    expected = {name: array.astype(mx.float32) for name, array in dequantized(quantized).items()}
    found = weights_of(tmp_path / "out")
    if Checkpoint(quantized).quantization == {"group_size": 32, "bits": 6, "mode": "affine"}:
        assert same_bits(found, expected)
    else:  # these have no scales in bfloat16 to be computed in
        assert all(mx.allclose(found[name], expected[name], 1e-2) for name in expected)


def test_requantized_from_what_was_dequantized(quantized: Path, tmp_path: Path) -> None:
    smaller = Quantization(64, 3)
    plain = convert_model(quantized, tmp_path / "plain", dequantize=True).path
    convert_model(quantized, tmp_path / "direct", smaller)
    convert_model(plain, tmp_path / "roundabout", smaller)
    direct, roundabout = weights_of(tmp_path / "direct"), weights_of(tmp_path / "roundabout")
    left = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]  # 96 wide
    assert same_bits(
        {name: array for name, array in direct.items() if not name.startswith(tuple(left))},
        {name: array for name, array in roundabout.items() if not name.startswith(tuple(left))},
    )
    stored = weights_of(quantized)
    assert same_bits(
        {name: array for name, array in direct.items() if name.startswith(tuple(left))},
        {name: array for name, array in stored.items() if name.startswith(tuple(left))},
    )
    table = json.loads((tmp_path / "direct" / "config.json").read_text())["quantization"]
    was = {key: value for key, value in Checkpoint(quantized).quantization.items() if key in table}
    assert table == {"group_size": 64, "bits": 3, "mode": "affine", **dict.fromkeys(left, was)}
    tokens = mx.array([[1, 5, 9, 33, 2, 7]])
    assert mx.all(mx.isfinite(load_model(Checkpoint(tmp_path / "direct"))(tokens)))


def test_layers_that_keep_their_form_keep_every_bit(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", PHI_4, parameters(PHI_4, mx.bfloat16))
    six = Quantization(32, 6)
    convert_model(source, tmp_path / "six", six)
    recipe = Recipe("own", Quantization(32, 3), (Rule("lm_head", six), Rule("*.o_proj", None)))
    convert_model(tmp_path / "six", tmp_path / "out", recipe)
    was, found = weights_of(tmp_path / "six"), weights_of(tmp_path / "out")
    kept = [name for name in was if "lm_head" in name or "o_proj" in name or "norm" in name]
    assert len(kept) == 3 + 2 * 3 + 5
    assert same_bits({n: was[n] for n in kept}, {n: found[n] for n in kept})
    model = load_model(Checkpoint(tmp_path / "out"))
    assert [model.lm_head.bits, model.layers[0].self_attn.o_proj.bits] == [6, 6]
    assert model.layers[1].mlp.gate_up_proj.bits == 3


@pytest.mark.slow
@pytest.mark.parametrize("batch_bytes", [1000, 20_000])
def test_blocks_of_any_size_give_the_same_bits(
    tmp_path: Path, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "source", PHI_4, parameters(PHI_4, mx.bfloat16), shards=3)
    convert_model(source, tmp_path / "a", Quantization(32, 5))
    convert_model(tmp_path / "a", tmp_path / "c", Quantization(32, 2), "float16")
    monkeypatch.setattr(plan_module, "BATCH_BYTES", batch_bytes)
    convert_model(source, tmp_path / "b", Quantization(32, 5))
    convert_model(tmp_path / "b", tmp_path / "d", Quantization(32, 2), "float16")
    for one, other in (("a", "b"), ("c", "d")):
        assert (tmp_path / one / "model.safetensors").read_bytes() == (
            tmp_path / other / "model.safetensors"
        ).read_bytes()
