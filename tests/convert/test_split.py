"""Projections written apart, in the layout of LlamaForCausalLM, and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from convert import Quantization, convert
from convert import plan as plan_module
from phimlx.checkpoint.load import build_model
from phimlx.cli.group import cli
from phimlx.errors import ConfigError, ConversionError
from tests.checkpoint.test_tensors import split
from tests.convert.tiny import MINI, PHI_4, failing, parameters, same_bits, weights_of, write_model

LLAMA_NAMES = {
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
    "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
}  # fmt: skip


def stored(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in folder.glob("*.safetensors"):
        arrays, metadata = mx.load(str(file), return_metadata=True)
        assert isinstance(arrays, dict)
        assert metadata == {"format": "pt"}
        found |= arrays
    return found


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("batch", [1 << 10, 16 << 20])
def test_there_and_back(
    tmp_path: Path, dtype: mx.Dtype, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "BATCH_BYTES", batch)
    weights = parameters(PHI_4, dtype)
    source = write_model(tmp_path / "source", PHI_4, weights)
    out = tmp_path / "out"
    result = convert(source, out, layout="hf", split_projections=True, shard_bytes=1 << 15)
    written = stored(out)
    assert same_bits(written, split(weights))
    layer = {name.split(".", 3)[3].removesuffix(".weight") for name in written if ".0." in name}
    assert layer == LLAMA_NAMES
    assert result.tensors == len(written)
    assert same_bits(weights_of(out), weights)
    config = config_of(out)
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert (config["attention_bias"], config["mlp_bias"]) == (False, False)
    assert build_model(config).config == build_model(PHI_4).config
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == written.keys()
    convert(out, tmp_path / "back", layout="hf")
    assert same_bits(stored(tmp_path / "back"), weights)
    assert config_of(tmp_path / "back")["model_type"] == "phi3"


def test_of_a_quantized_model(tmp_path: Path) -> None:
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    convert(write_model(tmp_path / "source", PHI_4), packed, Quantization(32, 4))
    convert(packed, plain, dequantize=True, layout="hf")
    convert(packed, tmp_path / "out", dequantize=True, layout="hf", split_projections=True)
    assert same_bits(stored(tmp_path / "out"), split(stored(plain)))


def test_a_window_makes_it_mistral_s_shape(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", {**PHI_4, "sliding_window": 24})
    convert(source, tmp_path / "out", layout="hf", split_projections=True)
    config = config_of(tmp_path / "out")
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 24)
    assert build_model(config).config.sliding_window == 24
    source = write_model(tmp_path / "wide", {**PHI_4, "sliding_window": 262_144})
    convert(source, tmp_path / "none", layout="hf", split_projections=True)
    config = config_of(tmp_path / "none")
    assert config["model_type"] == "llama"
    assert "sliding_window" not in config


def test_longrope_goes_along(tmp_path: Path) -> None:
    whole = {
        **MINI,
        "partial_rotary_factor": 1.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 32.0, 32.0],
        },
    }
    source = write_model(tmp_path / "source", whole)
    convert(source, tmp_path / "out", layout="hf", split_projections=True)
    assert build_model(config_of(tmp_path / "out")).config == build_model(whole).config
    assert "lm_head.weight" not in stored(tmp_path / "out")


def test_channels_that_do_not_turn_cannot_be_told(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", MINI)
    with pytest.raises(ConfigError) as caught:
        convert(source, tmp_path / "out", layout="hf", split_projections=True)
    assert str(caught.value) == (
        "config.json: partial_rotary_factor is 0.75, which neither Llama's shape nor Mistral's can "
        "tell."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("layout", ["mlx", "gguf"])
def test_only_in_hub_layout(tmp_path: Path, layout: str) -> None:
    source = write_model(tmp_path / "source", PHI_4)
    error = failing(source, tmp_path / "out", layout=layout, split_projections=True)
    assert str(error) == "Projections are split in Hub layout alone."


def test_an_architecture_without_fused_projections(tmp_path: Path, data: Path) -> None:
    source = data / "tiny" / "tiny-phi2"
    with pytest.raises(ConversionError, match="phi models have no layout with split projections"):
        convert(source, tmp_path / "out", layout="hf", split_projections=True)


def test_command(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", PHI_4)
    arguments = ["convert", str(source), "--mlx-path", str(tmp_path / "out"), "--split-projections"]
    refused = CliRunner().invoke(cli, arguments)
    assert refused.exit_code == 2
    assert "--split-projections goes with --export hf." in refused.stderr
    done = CliRunner().invoke(cli, [*arguments, "--export", "hf", "--json"])
    assert done.exit_code == 0, done.output
    assert same_bits(stored(tmp_path / "out"), split(parameters(PHI_4)))
