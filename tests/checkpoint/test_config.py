"""config.json, in every form that is not a Phi-4 model's: what is said of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from convert import convert
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import ConfigError, PhimlxError
from phimlx.models import registry
from tests.convert.tiny import MINI, PHI_4, parameters, write_config, write_model, write_safetensors

FACTORS = MINI["rope_scaling"]


def loading(folder: Path) -> PhimlxError:
    """The error that loading a folder ends with."""
    with pytest.raises(PhimlxError) as caught:
        load_model(Checkpoint(folder))
    return caught.value


# The folder and its config.json


def test_not_a_folder(tmp_path: Path) -> None:
    assert str(loading(tmp_path / "none")) == f"{tmp_path}/none is not a folder."


def test_no_config(tmp_path: Path) -> None:
    error = loading(tmp_path)
    assert isinstance(error, ConfigError)
    assert str(error) == f"{tmp_path} holds no config.json, so it is not a model folder."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON (line 1, column 1: Expecting value)."),
        (b'{"a": "\xff"}', "is not UTF-8 text."),
        (b"[]", "is not a JSON object."),
        (b"null", "is not a JSON object."),
        (b"[" * 100_000, "is nested too deeply."),
        (b'{"a":' * 100_000, "is nested too deeply."),
    ],
)
def test_config_that_is_no_object(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert str(loading(tmp_path)) == f"{tmp_path / 'config.json'} {message}"


def test_a_config_without_end(tmp_path: Path) -> None:
    write_config(tmp_path, PHI_4)
    os.truncate(tmp_path / "config.json", (64 << 20) + 1)
    assert str(loading(tmp_path)) == f"{tmp_path / 'config.json'} is larger than 64.0 MB."


def test_a_config_that_links_to_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("config.json")
    error = loading(tmp_path)
    assert str(error) == f"{tmp_path} holds no config.json, so it is not a model folder."


LIMIT = "not a whole number from 1 to"
KNOWN = ", ".join(each.model_type for each in registry.ARCHITECTURES)
FAMILY = f"but phimlx runs the Phi family: {KNOWN}."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            f"model_type is 'gpt2', {FAMILY}",
        ),
        ({"model_type": None}, f"model_type is None, {FAMILY}"),
        (
            {"model_type": ["phi3"]},
            f"model_type is ['phi3'], {FAMILY}",
        ),
        (
            {"model_type": "x" * 100_000},
            f"model_type is '{'x' * 56}..., {FAMILY}",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but Phi models have 'silu'."),
        ({"attention_bias": True}, "attention_bias is True, but Phi models have False."),
        ({"hidden_size": None}, "hidden_size is missing."),
        ({"hidden_size": 0}, f"hidden_size is 0, {LIMIT} 1048576."),
        ({"hidden_size": -64}, f"hidden_size is -64, {LIMIT} 1048576."),
        ({"hidden_size": "64"}, f"hidden_size is '64', {LIMIT} 1048576."),
        ({"hidden_size": True}, f"hidden_size is True, {LIMIT} 1048576."),
        ({"hidden_size": 64.0}, f"hidden_size is 64.0, {LIMIT} 1048576."),
        ({"hidden_size": [64]}, f"hidden_size is [64], {LIMIT} 1048576."),
        ({"hidden_size": 1 << 40}, f"hidden_size is 1099511627776, {LIMIT} 1048576."),
        ({"num_hidden_layers": 10**9}, f"num_hidden_layers is 1000000000, {LIMIT} 1024."),
        ({"vocab_size": 1 << 60}, f"vocab_size is {1 << 60}, {LIMIT} 16777216."),
        ({"head_dim": 0}, f"head_dim is 0, {LIMIT} 16384."),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads (4) is not a multiple of num_key_value_heads (3).",
        ),
        ({"hidden_size": 66}, "hidden_size (66) is not a multiple of num_attention_heads (4)."),
        (
            {"sliding_window": 0},
            "sliding_window is 0, not a whole number from 1 to 1073741824.",
        ),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', not true or false."),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, not a number above 0."),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, not a number above 0."),
        ({"rope_theta": float("inf")}, "rope_theta is inf, not a number above 0."),
        ({"rope_scaling": [1]}, "rope_scaling is [1], not a table of values."),
        (
            {"rope_scaling": {"type": "ntk", "factor": 4.0}},
            "rope_scaling.type is 'ntk', but Phi models have 'default' or 'longrope' or 'linear' "
            "or 'dynamic' or 'yarn'.",
        ),
        (
            {"rope_scaling": {**FACTORS, "rope_type": "default"}},
            "rope_scaling.rope_type is 'default', but rope_scaling.type is 'longrope'.",
        ),
        (
            {"rope_scaling": {**FACTORS, "beta_fast": 32}},
            "rope_scaling.beta_fast is not a setting that Phi-4 models use.",
        ),
        (
            {"rope_scaling": {"long_factor": [1.0] * 6, "short_factor": [1.0] * 6}},
            "long and short factors are given, but no rope type.",
        ),
        (
            {"rope_scaling": {**FACTORS, "long_factor": [1.0] * 5}},
            "long_factor needs 6 numbers, one a frequency; it has 5.",
        ),
        (
            {"rope_scaling": {**FACTORS, "short_factor": [1.0] * 7}},
            "short_factor needs 6 numbers, one a frequency; it has 7.",
        ),
        (
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 6}},
            "short_factor needs 6 numbers, one a frequency; it has none.",
        ),
        (
            {"rope_scaling": {**FACTORS, "long_factor": [1.0] * 5 + ["2"]}},
            "long_factor is '2', not a number above 0.",
        ),
        (
            {"rope_scaling": {**FACTORS, "long_factor": [1.0] * 5 + [0.0]}},
            "long_factor is 0.0, not a number above 0.",
        ),
        (
            {"partial_rotary_factor": 0.01},
            "partial_rotary_factor (0.01) turns 0 of 16 channels; it must be an even number of "
            "them, and not none.",
        ),
        (
            {"partial_rotary_factor": 1.5},
            "partial_rotary_factor (1.5) turns 24 of 16 channels; it must be an even number of "
            "them, and not none.",
        ),
        (
            {"original_max_position_embeddings": 512},
            "original_max_position_embeddings (512) is above max_position_embeddings (256).",
        ),
        (
            {"original_max_position_embeddings": None},
            "original_max_position_embeddings is missing.",
        ),
        (
            {"original_max_position_embeddings": 1},
            "original_max_position_embeddings is 1, from which no attention_factor follows.",
        ),
        (
            {"rope_parameters": {"rope_theta": 500000.0}},
            "rope_theta is 10000.0, but rope_parameters.rope_theta is 500000.0.",
        ),
        (
            {"rope_parameters": {**FACTORS, "long_factor": [1.0] * 6}},
            "rope_parameters.long_factor is [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], but "
            "rope_scaling.long_factor is [1.0, 2.0, 4.0, 8.0, 16.0, 32.0].",
        ),
        (
            {"rope_parameters": {**FACTORS, "original_max_position_embeddings": 64}},
            "original_max_position_embeddings is 32, but "
            "rope_parameters.original_max_position_embeddings is 64.",
        ),
        (
            {"rope_parameters": {"rope_type": "default"}},
            "rope_parameters.rope_type is 'default', but rope_scaling.type is 'longrope'.",
        ),
        (
            {"rope_scaling": {**FACTORS, "max_position_embeddings": 512}},
            "max_position_embeddings is 256, but rope_scaling.max_position_embeddings is 512.",
        ),
    ],
)
def test_config_values(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_config(tmp_path, {**MINI, **changes})
    error = loading(tmp_path)
    assert isinstance(error, ConfigError)
    assert str(error) == f"config.json: {message}"


# Quantization tables


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([4], "quantization is [4], not a table of values."),
        ({"bits": 4}, "quantization.group_size is None, but affine has 32 or 64 or 128."),
        (
            {"group_size": 16, "bits": 4},
            "quantization.group_size is 16, but affine has 32 or 64 or 128.",
        ),
        (
            {"group_size": 32, "bits": 7},
            "quantization.bits is 7, but affine has 2 or 3 or 4 or 5 or 6 or 8.",
        ),
        (
            {"group_size": 32, "bits": 4.0},
            "quantization.bits is 4.0, but affine has 2 or 3 or 4 or 5 or 6 or 8.",
        ),
        (
            {"group_size": 64, "bits": 4, "mode": "mxfp4"},
            "quantization.group_size is 64, but mxfp4 has 32.",
        ),
        (
            {"group_size": 32, "bits": 8, "mode": "mxfp4"},
            "quantization.bits is 8, but mxfp4 has 4.",
        ),
        (
            {"group_size": 32, "bits": 4, "mode": "int4"},
            "quantization.mode is 'int4', not one of affine, mxfp4, mxfp8, nvfp4.",
        ),
        (
            {"group_size": 32, "bits": 4, "mode": {}},
            "quantization.mode is {}, not one of affine, mxfp4, mxfp8, nvfp4.",
        ),
        (
            {"group_size": 32, "bits": 4, "lm_head": {"bits": 1}},
            "quantization.lm_head.bits is 1, but affine has 2 or 3 or 4 or 5 or 6 or 8.",
        ),
    ],
)
def test_quantization_tables(tmp_path: Path, table: Any, message: str) -> None:
    error = loading(write_model(tmp_path, {**PHI_4, "quantization": table}))
    assert isinstance(error, ConfigError)
    assert str(error) == f"config.json: {message}"


PROJECTION = "model.layers.0.self_attn.o_proj"
SCALES = mx.ones((64, 2))
# How other frameworks store a layer: the method, and tensors in place of or beside its weight.
FOREIGN = [
    ("awq", {"qweight": mx.zeros((64, 8), mx.int32), "scales": SCALES, "qzeros": SCALES}),
    ("gptq", {"qweight": mx.zeros((8, 64), mx.int32), "g_idx": mx.zeros(64, mx.int32)}),
    ("bitsandbytes", {"weight": mx.zeros((2048, 1), mx.uint8), "weight.absmax": mx.ones(64)}),
    ("bitsandbytes", {"weight": mx.zeros((64, 64), mx.int8), "SCB": mx.ones(64)}),
    ("compressed-tensors", {"weight_packed": mx.zeros((64, 8), mx.int32), "weight_scale": SCALES}),
    ("compressed-tensors", {"weight": mx.zeros((64, 64), mx.int8), "weight_scale": SCALES}),
    ("compressed-tensors", {"weight": mx.ones((64, 64)), "weight_scale": SCALES}),
    ("fp8", {"weight": mx.zeros((64, 64), mx.int8), "weight_scale_inv": SCALES}),
]


def foreign(folder: Path, config: dict[str, Any], method: str, parts: dict[str, mx.array]) -> Path:
    """A folder in which another framework has packed one layer."""
    weights = parameters(config)
    del weights[f"{PROJECTION}.weight"]
    weights |= {f"{PROJECTION}.{part}": array for part, array in parts.items()}
    return write_model(folder, {**config, "quantization_config": {"quant_method": method}}, weights)


@pytest.mark.parametrize("config", [PHI_4, MINI])
@pytest.mark.parametrize(("method", "parts"), FOREIGN)
def test_another_frameworks_quantization(
    tmp_path: Path, config: dict[str, Any], method: str, parts: dict[str, mx.array]
) -> None:
    folder = foreign(tmp_path / "a folder", config, method, parts)
    error = loading(folder)
    assert isinstance(error, ConfigError)
    framework = {"awq": "AWQ", "gptq": "GPTQ"}.get(method, method)
    assert str(error) == (
        f"config.json: quantization_config is another framework's ({framework}), whose weights "
        "phimlx converts but does not run."
    )
    assert error.hint == f"Convert it: phimlx convert '{folder}' --mlx-path OUT -q"


@pytest.mark.parametrize("method", ["hqq", "aqlm", "quanto", "torchao", "exl2", "eetq", "higgs"])
def test_a_quantization_that_is_not_read(tmp_path: Path, method: str) -> None:
    folder = foreign(tmp_path / "in", PHI_4, method, {"weight_packed": mx.zeros((64, 8), mx.uint8)})
    errors = [loading(folder)]
    with pytest.raises(ConfigError) as caught:
        convert(folder, tmp_path / "out")
    for error in (*errors, caught.value):
        assert str(error) == (
            f"config.json: quantization_config is another framework's ({method}), which phimlx "
            "does not read."
        )
        assert error.hint == "Convert the original model: phimlx convert MODEL --mlx-path OUT -q"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "framework"), [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")]
)
def test_settings_in_a_file_of_their_own(tmp_path: Path, name: str, framework: str) -> None:
    folder = foreign(tmp_path, PHI_4, *FOREIGN[1])
    write_config(folder, PHI_4)
    (folder / name).write_text('{"bits": 4, "group_size": 32}')
    assert str(loading(folder)) == (
        f"{name} is another framework's ({framework}), whose weights phimlx converts but does not "
        "run."
    )


@pytest.mark.parametrize("text", ['{"bits": 4}', "{", "[]", '{"quant_method": ["gptq"]}'])
@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_settings_that_were_left_beside_plain_weights(tmp_path: Path, name: str, text: str) -> None:
    folder = write_model(tmp_path / "left", PHI_4)
    (folder / name).write_text(text)
    assert Checkpoint(folder).foreign is None
    load_model(Checkpoint(folder))
    convert(folder, tmp_path / "out")


def test_another_frameworks_quantization_in_types_that_mlx_has_not(tmp_path: Path) -> None:
    write_config(tmp_path, {**PHI_4, "quantization_config": {"quant_method": "fp8"}})
    table = {"dtype": "F8_E4M3", "shape": [64, 64], "data_offsets": [0, 4096]}
    header = {f"{PROJECTION}.weight": table}
    write_safetensors(tmp_path / "model.safetensors", header, bytes(4096))
    assert "another framework's" in str(loading(tmp_path))


def test_another_frameworks_weights_under_its_own_name(tmp_path: Path) -> None:
    folder = foreign(tmp_path, PHI_4, *FOREIGN[1])
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    assert "another framework's" in str(loading(folder))


@pytest.mark.parametrize("config", [PHI_4, MINI])
@pytest.mark.parametrize("method", ["bitsandbytes", "awq", "gptq", "fp8", "compressed-tensors"])
def test_a_quantization_that_was_left_over_plain_weights(
    tmp_path: Path, config: dict[str, Any], method: str
) -> None:
    left = {**config, "quantization_config": {"quant_method": method, "bits": 4}}
    checkpoint = Checkpoint(write_model(tmp_path / "left", left))
    plain = Checkpoint(write_model(tmp_path / "plain", config))
    assert checkpoint.config == config
    tokens = mx.array([[1, 5, 9, 33]])
    assert mx.array_equal(load_model(checkpoint)(tokens), load_model(plain)(tokens))
    convert(tmp_path / "left", tmp_path / "out", dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
