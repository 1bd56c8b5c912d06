"""The tensors of a conversion, against mlx-lm's and MLX's own."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from safetensors import safe_open

from convert import Quantization
from convert import convert as convert_model
from convert import plan as plan_module
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from tests.convert.tiny import (
    MINI,
    PHI_4,
    bytes_of,
    parameters,
    plan,
    same_bits,
    weights_of,
    write_model,
)

GOLDENS = Path(__file__).parents[1] / "goldens"
MLX_LM = json.loads((GOLDENS / "convert.json").read_text())
TOKENS = mx.array([[1, 5, 9, 33, 2, 7] * 8])  # longer than MINI's step


@pytest.mark.parametrize(
    "case",
    MLX_LM["cases"],
    ids=lambda case: "-".join(str(value) for value in list(case.values())[:-1]),
)
def test_tensors_are_those_of_mlx_lm(tmp_path: Path, case: dict[str, Any]) -> None:
    bits, recipe = case["bits"], case["recipe"]
    if bits is not None and recipe is None:
        recipe = Quantization(case["group_size"], bits, case["mode"])
    source = GOLDENS / "models" / case["model"]
    convert_model(source, tmp_path / "out", recipe, case["dtype"])
    if case.get("dequantize"):
        convert_model(tmp_path / "out", tmp_path / "plain", dequantize=True)
    found = {}
    out = tmp_path / "plain" if case.get("dequantize") else tmp_path / "out"
    for name, array in weights_of(out).items():
        digest = hashlib.sha256(bytes_of(array)).hexdigest()[:32]
        found[name] = f"{str(array.dtype).rpartition('.')[2]} {list(array.shape)} {digest}"
    expected = case["tensors"]
    if bits is not None and platform.machine() != MLX_LM["machine"]:
        # Another kind of processor rounds the scales differently: compare types and shapes.
        found, expected = (
            {name: form.rpartition(" ")[0] for name, form in forms.items()}
            for forms in (found, expected)
        )
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("config", [PHI_4, MINI])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_tensors_are_those_of_mlx_quantize(
    tmp_path: Path, config: dict[str, Any], bits: int, group_size: int
) -> None:
    source = write_model(tmp_path / "source", config, parameters(config, mx.bfloat16))
    result = convert_model(source, tmp_path / "out", Quantization(group_size, bits))
    model = load_model(Checkpoint(source))
    nn.quantize(
        model,
        group_size,
        bits,
        class_predicate=lambda _, module: (
            hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0
        ),
    )
    assert same_bits(weights_of(tmp_path / "out"), dict(tree_flatten(model.parameters())))
    assert mx.array_equal(load_model(Checkpoint(tmp_path / "out"))(TOKENS), model(TOKENS))
    left = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]  # 96 wide
    assert sorted(result.undivided) == (left if group_size == 64 else [])


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]
)
def test_modes_without_biases(tmp_path: Path, mode: str, group_size: int, bits: int) -> None:
    source = write_model(tmp_path / "source")
    convert_model(source, tmp_path / "out", Quantization(group_size, bits, mode))
    model = load_model(Checkpoint(source))
    nn.quantize(model, group_size, bits, mode=mode)
    assert same_bits(weights_of(tmp_path / "out"), dict(tree_flatten(model.parameters())))
    assert mx.array_equal(load_model(Checkpoint(tmp_path / "out"))(TOKENS), model(TOKENS))


def test_without_quantization_every_bit_stays(tmp_path: Path) -> None:
    weights = parameters(PHI_4, mx.bfloat16)
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(mx.float32)
    source = write_model(tmp_path / "source", PHI_4, weights)
    result = convert_model(source, tmp_path / "out")
    assert same_bits(weights_of(tmp_path / "out"), weights)
    assert result.dtype is None  # there are two


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_casts_every_tensor(tmp_path: Path, dtype: str) -> None:
    source = write_model(tmp_path / "source")
    convert_model(source, tmp_path / "out", dtype=dtype)
    expected = {name: a.astype(getattr(mx, dtype)) for name, a in parameters(PHI_4).items()}
    assert same_bits(weights_of(tmp_path / "out"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == dtype


def test_shards_and_a_stored_head_change_nothing(tmp_path: Path) -> None:
    weights = parameters(MINI)
    plain = write_model(tmp_path / "plain", MINI, weights)
    stored = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    other = write_model(tmp_path / "other", MINI, stored, shards=3)
    convert_model(plain, tmp_path / "a", Quantization(32, 4))
    convert_model(other, tmp_path / "b", Quantization(32, 4))
    assert same_bits(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    assert "lm_head.weight" not in Checkpoint(tmp_path / "b").tensors


def test_large_models_come_in_shards(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    result = plan(source, out, shard_bytes=40_000).run()
    files = sorted(file.name for file in out.glob("*.safetensors"))
    count = len(files)
    assert count > 4
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": result.bytes_after}
    assert index["weight_map"].keys() == parameters(PHI_4).keys()
    for file in files:
        tensors = [name for name, place in index["weight_map"].items() if place == file]
        assert (
            sum(parameters(PHI_4)[name].nbytes for name in tensors) <= 40_000 or len(tensors) == 1
        )
    assert same_bits(weights_of(out), parameters(PHI_4))


def test_the_files_say_that_they_are_mlx(tmp_path: Path) -> None:
    convert_model(write_model(tmp_path / "source"), tmp_path / "out", Quantization(32, 4))
    with safe_open(str(tmp_path / "out" / "model.safetensors"), framework="mlx") as opened:
        assert opened.metadata() == {"format": "mlx"}
    length = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0


@pytest.mark.parametrize("quantization", [None, Quantization(64, 4)])
def test_no_more_than_some_blocks_are_held(
    tmp_path: Path, quantization: Quantization | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "BATCH_BYTES", 1 << 18)
    config = {**PHI_4, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8192}
    source = write_model(tmp_path / "source", config)
    largest = max(info.nbytes for info in Checkpoint(source).tensors.values())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    convert_model(source, tmp_path / "out", quantization)
    assert mx.get_peak_memory() - before < 4 << 18 < largest / 8


def test_the_result_counts(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", PHI_4, parameters(PHI_4, mx.bfloat16))
    seen: list[int] = []
    planned = plan(source, tmp_path / "out", Quantization(32, 4))
    result = planned.run(seen.append)
    matrices = sum(a.size for a in parameters(PHI_4).values() if a.ndim == 2)
    norms = 5 * 64
    assert result.parameters == matrices + norms
    assert result.bytes_before == 2 * result.parameters == sum(seen) == planned.bytes_before
    assert result.bytes_after == matrices * 5 // 8 + 2 * norms  # 4 bits, and 32 for 32 weights
    assert result.bits_per_weight == 8 * result.bytes_after / result.parameters
    assert result.tensors == 3 * 10 + 5
    assert result.dtype == "bfloat16"
    assert result.path == tmp_path / "out"
    assert result.seconds > 0


# The tiny checkpoints that transformers 5 saved


@pytest.mark.parametrize("name", ["tiny-phi4", "tiny-phi4-mini"])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_checkpoints_in_the_other_dialect(
    data: Path, tmp_path: Path, name: str, bits: int | None
) -> None:
    source = data / "tiny" / name
    convert_model(source, tmp_path / "out", bits and Quantization(32, bits))
    model = load_model(Checkpoint(source))
    if bits is not None:
        nn.quantize(model, 32, bits)
    assert mx.array_equal(load_model(Checkpoint(tmp_path / "out"))(TOKENS), model(TOKENS))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "rope_parameters" not in config
    assert config["rope_theta"] == (250000 if name == "tiny-phi4" else 10000.0)
