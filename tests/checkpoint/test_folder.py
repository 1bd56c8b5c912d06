"""Model folders, whole, broken and hostile: what loads, and what is said of the rest."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from convert import convert
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import CheckpointError, ConfigError, PhimlxError
from tests.convert.tiny import (
    MINI,
    PHI_4,
    parameters,
    same_bits,
    weights_of,
    write_config,
    write_index,
    write_model,
    write_safetensors,
)

TOKENS = mx.array([[1, 5, 9, 33, 2, 7]])
FACTORS = MINI["rope_scaling"]


def loading(folder: Path) -> PhimlxError:
    """The error that loading a folder ends with."""
    with pytest.raises(PhimlxError) as caught:
        load_model(Checkpoint(folder))
    return caught.value


def bits_of(array: mx.array) -> mx.array:
    return array.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size])


# What loads


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", [PHI_4, MINI])
def test_every_weight_arrives_as_it_is_stored(
    tmp_path: Path, config: dict[str, Any], shards: int
) -> None:
    weights = parameters(config, mx.bfloat16)
    model = load_model(Checkpoint(write_model(tmp_path, config, weights, shards)))
    loaded = dict(tree_flatten(model.parameters()))
    assert loaded.keys() == weights.keys()
    for name, array in weights.items():
        assert loaded[name].dtype == mx.bfloat16
        assert mx.array_equal(bits_of(loaded[name]), bits_of(array))


def test_a_stored_head_of_a_tied_model_is_left_aside(tmp_path: Path) -> None:
    weights = parameters(MINI)
    plain = load_model(Checkpoint(write_model(tmp_path / "plain", MINI, weights)))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    stored = load_model(Checkpoint(write_model(tmp_path / "stored", MINI, weights)))
    assert "lm_head.weight" not in dict(tree_flatten(stored.parameters()))
    assert mx.array_equal(stored(TOKENS), plain(TOKENS))


def test_both_dialects_give_the_same_numbers(tmp_path: Path) -> None:
    hub = load_model(Checkpoint(write_model(tmp_path / "hub", MINI)))
    rope = {
        **FACTORS,
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 32,
    }
    config = {k: v for k, v in MINI.items() if k not in ("rope_theta", "rope_scaling")}
    config |= {"rope_parameters": rope, "dtype": "float32"}
    other = load_model(Checkpoint(write_model(tmp_path / "transformers-5", config)))
    long = mx.arange(40)[None] % 48
    assert mx.array_equal(hub(TOKENS), other(TOKENS))
    assert mx.array_equal(hub(long), other(long))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_dtype_casts_what_is_not_packed(tmp_path: Path, dtype: mx.Dtype) -> None:
    model = load_model(Checkpoint(quantized_folder(tmp_path)), dtype)
    dtypes = {array.dtype for array in dict(tree_flatten(model.parameters())).values()}
    assert dtypes == {dtype, mx.uint32}


def quantized_folder(folder: Path, bits: int = 4, group_size: int = 32, **table: Any) -> Path:
    """MLX's own quantization of the tiny model, saved as mlx-lm saves it."""
    model = load_model(Checkpoint(write_model(folder / "source", PHI_4)))
    nn.quantize(model, group_size, bits)
    table = {"group_size": group_size, "bits": bits, **table}
    return write_model(
        folder / "quantized",
        {**PHI_4, "quantization": table, "quantization_config": table},
        dict(tree_flatten(model.parameters())),
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantized_layers_compute_as_mlx_quantized_them(tmp_path: Path, bits: int) -> None:
    folder = quantized_folder(tmp_path, bits)
    reference = load_model(Checkpoint(tmp_path / "source"))
    nn.quantize(reference, 32, bits)
    assert mx.array_equal(load_model(Checkpoint(folder))(TOKENS), reference(TOKENS))


def test_layers_may_differ_in_bits_or_stay_whole(tmp_path: Path) -> None:
    model = load_model(Checkpoint(write_model(tmp_path / "source", PHI_4)))
    eight, whole = "model.layers.0.mlp.down_proj", "lm_head"
    form = {"group_size": 32, "bits": 4, "mode": "affine"}
    table = {**form, eight: {**form, "bits": 8}, whole: False}
    nn.quantize(
        model,
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized")
            and path != whole
            and ({**form, "bits": 8} if path == eight else form)
        ),
    )
    folder = write_model(
        tmp_path / "mixed",
        {**PHI_4, "quantization": table},
        dict(tree_flatten(model.parameters())),
    )
    loaded = load_model(Checkpoint(folder))
    assert loaded.layers[0].mlp.down_proj.bits == 8
    assert loaded.layers[1].mlp.down_proj.bits == 4
    assert isinstance(loaded.lm_head, nn.Linear)
    assert mx.array_equal(loaded(TOKENS), model(TOKENS))


# Quantized tensors and their table


FORMS = [
    {"group_size": group_size, "bits": bits, "mode": "affine"}
    for group_size in (32, 64)
    for bits in (2, 3, 4, 5, 6, 8)
] + [
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    forms=st.lists(st.sampled_from([None, *FORMS]), min_size=1, max_size=10),
    default=st.sampled_from(FORMS),
    listed=st.sampled_from(["nothing", "nulls", "all"]),
)
def test_shapes_tell_the_form_of_each_layer(
    tmp_path: Path, forms: list[dict[str, Any] | None], default: dict[str, Any], listed: str
) -> None:
    """As mlx-lm's mixed recipes write it: with `null`, or layers left out of the table."""
    reference = load_model(Checkpoint(write_model(tmp_path / "source", PHI_4)))
    layers = [path for path, each in reference.named_modules() if hasattr(each, "to_quantized")]
    chosen = {path: forms[number % len(forms)] for number, path in enumerate(layers)}
    chosen = {
        path: None if path.endswith("down_proj") and form and form["group_size"] == 64 else form
        for path, form in chosen.items()  # which is 96 wide
    }
    nn.quantize(reference, class_predicate=lambda path, module: chosen.get(path) or False)
    table: dict[str, Any] = dict(default)
    for path, form in chosen.items() if listed != "nothing" else ():
        hidden = {"group_size": None, "bits": None} if listed == "nulls" else {}
        table[path] = False if form is None else {**form, **hidden}
    weights = dict(tree_flatten(reference.parameters()))
    folder = write_model(tmp_path / "mixed", {**PHI_4, "quantization": table}, weights)
    assert mx.array_equal(load_model(Checkpoint(folder))(TOKENS), reference(TOKENS))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    if any(chosen.values()):
        convert(folder, tmp_path / "out", dequantize=True, dtype="float32")
        for path, form in chosen.items():
            if form is not None:
                layer = reference
                for name in path.split("."):
                    layer = layer[int(name)] if name.isdigit() else layer[name]
                parts = (layer.weight, layer.scales, layer.get("biases"))
                plain = mx.dequantize(*parts, **form, dtype=mx.float32)
                assert mx.array_equal(weights_of(tmp_path / "out")[f"{path}.weight"], plain)


def test_quantized_tensors_of_a_form_that_mlx_has_not(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path)
    weights = Checkpoint(folder).weights()
    weights["lm_head.weight"] = mx.zeros((48, 14), mx.uint32)  # 7 bits
    write_model(folder, Checkpoint(folder).config, weights)
    assert str(loading(folder)) == (
        "lm_head.weight has shape [48, 14]; config.json makes it [48, 8]."
    )
    weights["lm_head.scales"] = mx.zeros((48, 3))
    table = {"group_size": 128, "bits": 4}
    write_model(folder, {**PHI_4, "quantization": table}, weights)
    assert str(loading(folder)) == "lm_head is 64 wide, which groups of 128 do not divide."


def test_quantized_weights_without_a_table(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path)
    write_config(folder, PHI_4)
    error = str(loading(folder))
    assert error.startswith("The checkpoint holds lm_head.biases, lm_head.scales, ")
    assert error.endswith(" and 17 more, which this architecture does not have.")


# Weight files


def test_no_weights(tmp_path: Path) -> None:
    write_config(tmp_path, PHI_4)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    error = loading(tmp_path)
    assert str(error) == (
        f"{tmp_path} holds no model.safetensors and no model.safetensors.index.json."
    )
    assert error.hint == "Only safetensors weights are read, never .bin or .pt files."


@pytest.mark.parametrize("with_config", [False, True])
def test_a_folder_of_gguf_files(tmp_path: Path, with_config: bool) -> None:
    (tmp_path / "phi-q4.gguf").write_bytes(b"GGUF")
    if with_config:
        write_config(tmp_path, PHI_4)
    hint = f"Convert it with: phimlx convert {tmp_path / 'phi-q4.gguf'} --mlx-path OUT -q"
    assert loading(tmp_path).hint == hint


def test_missing_tensors(tmp_path: Path) -> None:
    weights = parameters(PHI_4)
    for name in ("lm_head.weight", "model.norm.weight"):
        del weights[name]
    error = loading(write_model(tmp_path, PHI_4, weights))
    assert isinstance(error, CheckpointError)
    assert str(error) == "The checkpoint lacks model.norm.weight, lm_head.weight."


def test_all_tensors_missing(tmp_path: Path) -> None:
    error = loading(write_model(tmp_path, PHI_4, {"x": mx.zeros(1)}))
    assert str(error) == (
        "The checkpoint lacks model.embed_tokens.weight, model.layers.0.self_attn.qkv_proj.weight, "
        "model.layers.0.self_attn.o_proj.weight and 12 more."
    )


def test_unexpected_tensors(tmp_path: Path) -> None:
    long_name = "x" * 200
    weights = {**parameters(PHI_4), "model.extra": mx.zeros(1), long_name: mx.zeros(1)}
    assert str(loading(write_model(tmp_path, PHI_4, weights))) == (
        f"The checkpoint holds model.extra, {'x' * 97}..., which this architecture does not have."
    )


def test_misshaped_tensor(tmp_path: Path) -> None:
    weights = {**parameters(PHI_4), "model.norm.weight": mx.zeros((1, 64))}
    assert str(loading(write_model(tmp_path, PHI_4, weights))) == (
        "model.norm.weight has shape [1, 64]; config.json makes it [64]."
    )


def test_more_layers_than_are_stored(tmp_path: Path) -> None:
    weights = parameters(PHI_4)
    folder = write_model(tmp_path, {**PHI_4, "num_hidden_layers": 1024}, weights)
    assert str(loading(folder)) == (
        "The checkpoint lacks model.layers.2.self_attn.qkv_proj.weight, "
        "model.layers.2.self_attn.o_proj.weight, model.layers.2.mlp.gate_up_proj.weight and 6129 "
        "more."
    )


def test_the_largest_shapes_that_a_config_may_ask_for_take_no_memory(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path)
    large = {
        "hidden_size": 1 << 20,
        "intermediate_size": 1 << 22,
        "num_hidden_layers": 1024,
        "num_attention_heads": 4096,
        "num_key_value_heads": 4096,
        "vocab_size": 1 << 24,
    }
    config = Checkpoint(folder).config
    mx.reset_peak_memory()
    write_config(folder, {**config, **large})
    assert str(loading(folder)).startswith("The checkpoint lacks model.layers.2.")
    write_config(folder, {**config, **large, "num_hidden_layers": 2})
    assert str(loading(folder)).startswith("model.embed_tokens.weight has shape [48, 8]; ")
    assert mx.get_peak_memory() < 1 << 20


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (mx.uint32, "model.norm.weight is stored as U32; config.json makes it F32 or F16 or BF16."),
        (mx.uint8, "model.norm.weight is stored as U8; config.json makes it F32 or F16 or BF16."),
        (
            mx.int64,
            "model.norm.weight in model.safetensors is stored as I64, which phimlx does not read.",
        ),
    ],
)
def test_mistyped_tensor(tmp_path: Path, dtype: mx.Dtype, message: str) -> None:
    weights = {**parameters(PHI_4), "model.norm.weight": mx.ones(64).astype(dtype)}
    assert str(loading(write_model(tmp_path, PHI_4, weights))) == message


def test_packed_weights_must_be_packed(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path)
    weights = Checkpoint(folder).weights()
    weights["lm_head.weight"] = weights["lm_head.weight"].astype(mx.float32)
    write_model(folder, Checkpoint(folder).config, dict(weights))
    assert str(loading(folder)) == "lm_head.weight is stored as F32; config.json makes it U32."


# Indexes


@pytest.mark.parametrize(
    "file_name",
    [
        "../evil.safetensors",
        "/etc/evil.safetensors",
        "sub/model.safetensors",
        "..\\evil.safetensors",
        ".hidden.safetensors",
        "model.bin",
        "model.safetensors\n",
        "",
        "model\x00.safetensors",
        3,
        None,
        ["model.safetensors"],
    ],
)
def test_index_with_a_name_that_is_no_plain_file(tmp_path: Path, file_name: Any) -> None:
    folder = write_model(tmp_path, shards=2)
    write_index(folder, {"model.norm.weight": file_name})
    error = loading(folder)
    assert isinstance(error, CheckpointError)
    assert str(error) == (
        f"model.safetensors.index.json puts model.norm.weight in {file_name!r}, which is not a "
        "plain *.safetensors file name."
    )


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    folder = write_model(tmp_path, shards=2)
    write_index(folder, weight_map)
    assert str(loading(folder)) == "model.safetensors.index.json has no weight_map."


def test_index_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    folder = write_model(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    error = loading(folder)
    assert str(error) == (
        f"{folder} lacks model-00002-of-00003.safetensors, which model.safetensors.index.json "
        "names."
    )
    assert error.hint == "Download or convert the model again."


def test_index_and_files_disagree(tmp_path: Path) -> None:
    folder = write_model(tmp_path, shards=2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    swapped = {**weight_map, "model.norm.weight": "model-00001-of-00002.safetensors"}
    other = {**weight_map, "model.norm.weight": "model-00002-of-00002.safetensors"}
    wrong = swapped if swapped != weight_map else other
    write_index(folder, wrong)
    assert str(loading(folder)) == (
        f"model.safetensors.index.json says that model.norm.weight is in "
        f"{wrong['model.norm.weight']}, but it is not."
    )
    write_index(folder, {k: v for k, v in weight_map.items() if k != "model.norm.weight"})
    assert str(loading(folder)) == "model.safetensors.index.json does not name model.norm.weight."


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    folder = write_model(tmp_path, shards=2)
    first = folder / "model-00001-of-00002.safetensors"
    second = folder / "model-00002-of-00002.safetensors"
    both = {**dict(mx.load(str(second))), "model.embed_tokens.weight": mx.zeros((48, 64))}
    mx.save_safetensors(str(second), both)
    assert "model.embed_tokens.weight" in dict(mx.load(str(first)))
    assert str(loading(folder)) == (
        "model.embed_tokens.weight stands in both model-00001-of-00002.safetensors and "
        "model-00002-of-00002.safetensors."
    )


def weights_and_index(folder: Path, weight_map: Any) -> Path:
    """A whole model.safetensors beside some index."""
    write_model(folder)
    write_index(folder, weight_map)
    return folder


@pytest.mark.parametrize(
    "weight_map",
    [
        pytest.param(
            {"model.norm.weight": "model-00001-of-00002.safetensors"}, id="files that are gone"
        ),
        pytest.param({"model.norm.weight": "model.safetensors"}, id="fewer tensors"),
        pytest.param({"model.norm.scales": "model.safetensors"}, id="other tensors"),
        pytest.param(
            {"model.norm.weight": "model.safetensors", "lm_head.weight": "model-2.safetensors"},
            id="a file that is gone beside it",
        ),
        pytest.param({"model.norm.weight": "../evil.safetensors"}, id="no plain name"),
        pytest.param({}, id="empty"),
        pytest.param(None, id="nothing"),
    ],
)
def test_a_stale_index_beside_a_whole_model(tmp_path: Path, weight_map: Any) -> None:
    plain = load_model(Checkpoint(write_model(tmp_path / "plain")))
    folder = weights_and_index(tmp_path / "stale", weight_map)
    assert mx.array_equal(load_model(Checkpoint(folder))(TOKENS), plain(TOKENS))
    convert(folder, tmp_path / "out", dtype="float32")
    assert same_bits(weights_of(tmp_path / "out"), weights_of(tmp_path / "plain"))


@pytest.mark.parametrize("index", ["kept", "gone", "damaged"])
def test_a_whole_model_beside_old_shards(tmp_path: Path, index: str) -> None:
    """As transformers, which takes model.safetensors wherever it is there."""
    old = {name: mx.zeros_like(array) for name, array in parameters(PHI_4).items()}
    folder = write_model(tmp_path / "both", PHI_4, old, shards=3)
    write_model(folder)
    if index == "gone":
        (folder / "model.safetensors.index.json").unlink()
    if index == "damaged":
        (folder / "model.safetensors.index.json").write_text("{")
    plain = load_model(Checkpoint(write_model(tmp_path / "plain")))
    assert mx.array_equal(load_model(Checkpoint(folder))(TOKENS), plain(TOKENS))


def test_a_buffer_of_a_type_that_mlx_cannot_map(tmp_path: Path) -> None:
    file = write_model(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    data = content[start:]
    table = {"dtype": "F64", "shape": [8], "data_offsets": [len(data), len(data) + 64]}
    named = {**json.loads(content[8:start]), "model.rotary_emb.inv_freq": table}
    write_safetensors(file, named, data + bytes(64))
    assert str(loading(tmp_path)) == (
        "model.safetensors cannot be read by MLX: [safetensor] unsupported dtype F64."
    )
    convert(tmp_path, tmp_path / "out", dtype="float32")  # which reads what it needs alone
    assert same_bits(weights_of(tmp_path / "out"), parameters(PHI_4))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int64, mx.bool_])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        "model.embeddings.position_ids",
        "model.layers.0.self_attn.masked_bias",
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_buffers_that_are_computed_are_left_aside(
    tmp_path: Path, name: str, dtype: mx.Dtype, shards: int
) -> None:
    weights = {**parameters(PHI_4), name: mx.ones(8).astype(dtype)}
    folder = write_model(tmp_path / "buffers", PHI_4, weights, shards)
    plain = load_model(Checkpoint(write_model(tmp_path / "plain")))
    assert mx.array_equal(load_model(Checkpoint(folder))(TOKENS), plain(TOKENS))


# Hostile safetensors files: MLX would map some of these without a word


def header(*spans: tuple[int, int], dtype: str = "F32") -> dict[str, Any]:
    """One-dimensional tensors of 4-byte numbers at these byte offsets."""
    return {
        f"t{index}": {"dtype": dtype, "shape": [(end - begin) // 4], "data_offsets": [begin, end]}
        for index, (begin, end) in enumerate(spans)
    }


@pytest.mark.parametrize(
    ("head", "data", "length"),
    [
        pytest.param(b"", b"", None, id="empty header"),
        pytest.param({}, b"", 1 << 63, id="header length beyond everything"),
        pytest.param({}, b"", (1 << 64) - 1, id="header length of minus one"),
        pytest.param({}, b"", 200 << 20, id="header of 200 MB"),
        pytest.param({}, b"", 1000, id="header longer than the file"),
        pytest.param(b"not json", b"", None, id="header is no JSON"),
        pytest.param(b"\xff\xff\xff\xff", b"", None, id="header is no text"),
        pytest.param([], b"", None, id="header is a list"),
        pytest.param(b"[" * 10_000, b"", None, id="header nested deeply"),
        pytest.param(header((0, 64), (32, 96)), bytes(96), None, id="tensors overlap"),
        pytest.param(header((0, 64), (0, 64)), bytes(64), None, id="tensors share bytes"),
        pytest.param(header((0, 64), (80, 144)), bytes(144), None, id="gap between tensors"),
        pytest.param(header((0, 64)), bytes(200), None, id="bytes after the last tensor"),
        pytest.param(header((0, 64)), bytes(32), None, id="tensor beyond the end"),
        pytest.param(header((64, 0)), bytes(64), None, id="offsets backwards"),
        pytest.param(header((0, 1 << 62)), bytes(64), None, id="tensor beyond every disk"),
        pytest.param(header((0, 64), dtype="X9"), bytes(64), None, id="unknown type"),
        pytest.param(
            {"t": {"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]}},
            bytes(64),
            None,
            id="negative shape",
        ),
        pytest.param(
            {"t": {"dtype": "F32", "shape": [1 << 33, 1 << 33], "data_offsets": [0, 64]}},
            bytes(64),
            None,
            id="shape whose product overflows",
        ),
        pytest.param(
            {"t": {"dtype": "F32", "shape": [17], "data_offsets": [0, 64]}},
            bytes(64),
            None,
            id="shape and bytes disagree",
        ),
        pytest.param({"t": {"dtype": "F32"}}, b"", None, id="no shape"),
        pytest.param({"t": 3}, b"", None, id="no description"),
        pytest.param({"__metadata__": {"a": [1]}}, b"", None, id="metadata is no text"),
    ],
)
def test_damaged_file(
    tmp_path: Path, head: Any, data: bytes, length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path, PHI_4)
    write_safetensors(tmp_path / "model.safetensors", head, data, length)
    monkeypatch.setattr(mx, "load", lambda file: pytest.fail("MLX was given a damaged file"))
    error = loading(tmp_path)
    assert isinstance(error, CheckpointError)
    assert str(error).startswith("model.safetensors is not a whole safetensors file (")
    assert error.hint == "Download or convert the model again."


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 2000, -1])
def test_file_cut_short(tmp_path: Path, kept: int) -> None:
    file = write_model(tmp_path) / "model.safetensors"
    os.truncate(file, kept if kept >= 0 else file.stat().st_size + kept)
    assert str(loading(tmp_path)).startswith("model.safetensors is not a whole safetensors file (")


def test_a_name_twice_in_one_header(tmp_path: Path) -> None:
    """The later one counts for the parser; its bytes do not cover the file then."""
    write_config(tmp_path, PHI_4)
    one = json.dumps(header((0, 64))["t0"])
    two = json.dumps(header((64, 128))["t0"])
    write_safetensors(
        tmp_path / "model.safetensors", f'{{"t": {one}, "t": {two}}}'.encode(), bytes(128)
    )
    assert str(loading(tmp_path)).startswith("model.safetensors is not a whole safetensors file (")


def test_weights_that_are_a_folder(tmp_path: Path) -> None:
    write_config(tmp_path, PHI_4)
    (tmp_path / "model.safetensors").mkdir()
    assert str(loading(tmp_path)).startswith("model.safetensors is not a whole safetensors file (")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_never_do_more_than_an_error(
    tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    """The first 1500 bytes hold the header's length and most of the header."""
    file = write_model(tmp_path) / "model.safetensors"
    content = bytearray(file.read_bytes())
    for position, value in changes:
        content[position] = value
    file.write_bytes(content)
    try:
        model = load_model(Checkpoint(tmp_path))
    except (CheckpointError, ConfigError):
        return
    assert model(TOKENS).shape == (1, 6, 48)
