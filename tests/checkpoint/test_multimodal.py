"""Folders of Phi-4-multimodal: both layouts give the same numbers, and what is said of the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, load_model
from phimlx.errors import CheckpointError, ConfigError, PhimlxError
from phimlx.models import registry
from phimlx.models.names import Renames
from phimlx.models.phi4mm.model import Phi4MMConfig, Phi4MMForCausalLM
from phimlx.models.phi4mm.names import PATHS, TENSORS
from tests.convert.tiny import write_config, write_index

DIALECT = registry.dialect_of({"model_type": "phi4_multimodal"})
assert DIALECT is not None
RENAMES, ADAPTER_FOLDERS = Renames(PATHS, TENSORS), DIALECT.adapter_folders
BACKWARDS = Renames(
    {published: native for native, published in PATHS.items()},
    {published: native for native, published in TENSORS.items()},
)

# As `save_pretrained` of transformers writes the tiny model's config.
NATIVE: dict[str, Any] = {
    "architectures": ["Phi4MultimodalForCausalLM"],
    "model_type": "phi4_multimodal",
    "dtype": "float32",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0] * 6,
        "long_factor": [1.0, 4.0, 7.0, 10.0, 13.0, 16.0],
    },
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "sliding_window": 262144,
    "vision_config": {
        "model_type": "phi4_multimodal_vision",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_channels": 3,
        "image_size": 448,
        "crop_size": 448,
        "patch_size": 14,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-06,
        "feature_layer": -2,
        "image_token_id": 510,
    },
    "audio_config": {
        "model_type": "phi4_multimodal_audio",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_blocks": 2,
        "num_attention_heads": 4,
        "activation": "swish",
        "chunk_size": -1,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "depthwise_multiplier": 1,
        "kernel_size": 3,
        "conv_activation": "swish",
        "input_size": 80,
        "conv_glu_type": "swish",
        "time_reduction": 8,
        "bias_max_distance": 500,
        "bias_symmetric": False,
        "nemo_activation": "relu",
        "nemo_conv_channels": 16,
        "downsample_rate": 1,
        "audio_token_id": 511,
        "feature_layer": -2,
    },
}
LORA = {"vision": {"r": 8, "lora_alpha": 16}, "speech": {"r": 10, "lora_alpha": 20}}

Weights = Mapping[str, mx.array]


@pytest.fixture(scope="module")
def folder(data: Path) -> Path:
    return data / "tiny" / "tiny-phi4mm-remote"


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "model.safetensors")))


@pytest.fixture(scope="module")
def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def native_name(name: str) -> str:
    """Name a published tensor as transformers does."""
    return BACKWARDS.place(name).names[0]


def save(file: Path, weights: Weights) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(file), dict(weights), {"format": "pt"})


def write(folder: Path, config: Mapping[str, Any], weights: Weights) -> Path:
    save(folder / "model.safetensors", weights)
    write_config(folder, config)
    return folder


def write_native(folder: Path, weights: Weights, prefix: str = "") -> Path:
    """The published weights as transformers' conversion lays them out: adapters in folders."""
    base = {native_name(n): w for n, w in weights.items() if ".lora_" not in n}
    write(folder, NATIVE, base)
    for adapter, name in ADAPTER_FOLDERS.items():
        own = {
            prefix + n.replace(f".{adapter}.weight", ".weight"): w
            for n, w in weights.items()
            if f".{adapter}.weight" in n and ".lora_" in n
        }
        save(folder / name / "adapter_model.safetensors", own)
        (folder / name / "adapter_config.json").write_text(json.dumps(LORA[adapter]))
    return folder


def parameters(folder: Path) -> dict[str, mx.array]:
    return dict(tree_flatten(load_model(Checkpoint(folder)).parameters()))


def check_same(folder: Path, other: Path) -> None:
    """Every parameter is the other's, bit by bit, and so is what config.json says of them."""
    first, second = (load_model(Checkpoint(place)) for place in (folder, other))
    assert first.config == second.config
    ones, others = (dict(tree_flatten(model.parameters())) for model in (first, second))
    assert ones.keys() == others.keys()
    for name, array in ones.items():
        assert array.dtype == others[name].dtype, name
        assert mx.array_equal(array, others[name]), name


def loading(folder: Path) -> PhimlxError:
    with pytest.raises(PhimlxError) as caught:
        load_model(Checkpoint(folder))
    return caught.value


# transformers' own layout


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_the_native_layout_gives_the_same_model(
    folder: Path, weights: Weights, tmp_path: Path, prefix: str
) -> None:
    native = write_native(tmp_path / "native", weights, prefix)
    check_same(native, folder)
    assert Checkpoint(native).config["model_type"] == "phi4mm"
    stored = {tensor.reads(0, 1)[0].info.name for tensor in Checkpoint(native).tensors.values()}
    assert "model.layers.0.self_attn.qkv_proj.weight" in stored
    names = [file.relative_to(native).as_posix() for file in Checkpoint(native).files]
    assert names == [
        "model.safetensors",
        "vision-lora/adapter_model.safetensors",
        "speech-lora/adapter_model.safetensors",
    ]


def test_native_shards_with_an_index(folder: Path, weights: Weights, tmp_path: Path) -> None:
    native = write_native(tmp_path, weights)
    stored = dict(mx.load(str(native / "model.safetensors")))
    names = list(stored)
    (native / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(2):
        file = f"model-{shard + 1:05d}-of-00002.safetensors"
        save(native / file, {name: stored[name] for name in names[shard::2]})
        weight_map.update(dict.fromkeys(names[shard::2], file))
    write_index(native, weight_map)
    check_same(native, folder)


def test_native_names_with_the_adapters_among_them(
    folder: Path, weights: Weights, tmp_path: Path
) -> None:
    """As a model that had its adapters loaded is saved: `base_layer` and `lora_A.vision` names."""
    native = {
        n if "_proj.base_layer" in n or ".lora_" in n else native_name(n): w
        for n, w in weights.items()
    }
    config = {**NATIVE, "vision_lora": LORA["vision"], "speech_lora": LORA["speech"]}
    check_same(write(tmp_path, config, native), folder)


def test_native_names_are_transformers(weights: Weights) -> None:
    """Backwards and forwards; some of them as `convert_phi4_multimodal_weights_to_hf.py` has
    them."""
    for name in weights:
        if ".lora_" not in name:
            assert RENAMES.place(native_name(name)).names == (name,)
    extend = "model.embed_tokens_extend"
    for native, published in {
        f"{extend}.audio_embed.encoder.encoders.11.feed_forward_in.gate_up_proj.weight": (
            f"{extend}.audio_embed.encoder.encoders.11.feed_forward_in.net.0.linear.weight"
        ),
        f"{extend}.audio_embed.encoder.encoders.0.feed_forward_out.down_proj.bias": (
            f"{extend}.audio_embed.encoder.encoders.0.feed_forward_out.net.2.bias"
        ),
        f"{extend}.audio_embed.encoder.encoders.7.self_attn.o_proj.bias": (
            f"{extend}.audio_embed.encoder.encoders.7.self_attn.linear_out.bias"
        ),
        f"{extend}.audio_embed.down_proj_for_vision_speech.weight": (
            f"{extend}.audio_embed.audio_projection.vision.2.weight"
        ),
        f"{extend}.image_embed.sub_img_feature_extensor": f"{extend}.image_embed.sub_GN",
        f"{extend}.image_embed.img_projection_up.bias": (
            f"{extend}.image_embed.img_projection.0.bias"
        ),
        f"{extend}.image_embed.img_processor.encoder.layers.3.self_attn.q_proj.weight": (
            f"{extend}.image_embed.img_processor.encoder.layers.3.self_attn.q_proj.weight"
        ),
        "model.layers.31.mlp.gate_up_proj.weight": (
            "model.layers.31.mlp.gate_up_proj.base_layer.weight"
        ),
        "model.layers.31.mlp.gate_up_proj.scales": (
            "model.layers.31.mlp.gate_up_proj.base_layer.scales"
        ),
        "model.norm.weight": "model.norm.weight",
    }.items():
        assert RENAMES.place(native).names == (published,)
        assert native_name(published) == native


def test_native_without_adapters(weights: Weights, tmp_path: Path) -> None:
    base = {native_name(n): w for n, w in weights.items() if ".lora_" not in n}
    error = loading(write(tmp_path, NATIVE, base))
    assert isinstance(error, CheckpointError)
    assert str(error) == (
        f"{tmp_path} holds no adapters, without which this model neither sees nor hears: it lacks "
        "vision-lora/ and speech-lora/."
    )
    assert error.hint == "Download these folders too, each with adapter_model.safetensors."


def test_native_with_one_adapter(weights: Weights, tmp_path: Path) -> None:
    native = write_native(tmp_path, weights)
    (native / "speech-lora" / "adapter_model.safetensors").unlink()
    assert str(loading(native)).startswith(
        "The checkpoint lacks model.layers.0.self_attn.qkv_proj.lora_A.speech.weight, "
    )


def test_an_adapter_that_stands_twice(weights: Weights, tmp_path: Path) -> None:
    native = write_native(tmp_path, weights)
    stored = dict(mx.load(str(native / "model.safetensors")))
    name = "model.layers.0.self_attn.o_proj.lora_A.vision.weight"
    save(native / "model.safetensors", {**stored, name: weights[name]})
    assert str(loading(native)) == (
        "model.layers.0.self_attn.o_proj.lora_A.weight of vision-lora/adapter_model.safetensors "
        f"and {name} of model.safetensors are the same tensor."
    )


def test_a_damaged_adapter(weights: Weights, tmp_path: Path) -> None:
    native = write_native(tmp_path, weights)
    (native / "vision-lora" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    error = loading(native)
    assert str(error).startswith("adapter_model.safetensors is not a whole safetensors file (")
    assert error.hint == "Download or convert the model again."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"use_rslora": True},
            "vision-lora/adapter_config.json: use_rslora is True, but Phi-4-multimodal's adapters "
            "are plain LoRA.",
        ),
        (
            {"rank_pattern": {"o_proj": 4}},
            "vision-lora/adapter_config.json: rank_pattern is {'o_proj': 4}, but "
            "Phi-4-multimodal's adapters are plain LoRA.",
        ),
        ({"r": 0}, "config.json: vision_lora.r is 0, not a whole number from 1 to 16384."),
        ({"r": True}, "config.json: vision_lora.r is True, not a whole number from 1 to 16384."),
        ({"lora_alpha": -1}, "config.json: vision_lora.lora_alpha is -1, not a number above 0."),
    ],
)
def test_an_adapters_own_config(
    weights: Weights, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    native = write_native(tmp_path, weights)
    (native / "vision-lora" / "adapter_config.json").write_text(
        json.dumps({**LORA["vision"], **changes})
    )
    error = loading(native)
    assert isinstance(error, ConfigError)
    assert str(error) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"audio_config": {**NATIVE["audio_config"], "bias_symmetric": True}},
            "config.json: audio_config.bias_symmetric is True, but Phi-4-multimodal has False.",
        ),
        (
            {"audio_config": {**NATIVE["audio_config"], "feature_layer": -1}},
            "config.json: audio_config.feature_layer is -1, but Phi-4-multimodal has -2.",
        ),
        ({"vision_config": 3}, "config.json: vision_config is 3, not a table of values."),
        ({"audio_config": [3]}, "config.json: audio_config is [3], not a table of values."),
    ],
)
def test_native_settings_that_the_model_does_not_have(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model({**NATIVE, **changes})
    assert str(caught.value) == message


# The published layout


def test_a_config_that_leaves_the_published_values_out(data: Path) -> None:
    published = data / "hf" / "Phi-4-multimodal-instruct" / "config.json"
    config = Phi4MMConfig.from_dict(json.loads(published.read_text()))
    assert (config.image_token_id, config.audio_token_id) == (200010, 200011)
    assert (config.vision.num_hidden_layers, config.vision.hidden_size) == (27, 1152)
    assert config.adapters["vision"] == (256, 2.0)
    assert config.adapters["speech"] == (320, 2.0)
    assert config.max_position_embeddings == 131072


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_lora": None}, "vision_lora.r is None, not a whole number from 1 to 16384."),
        ({"speech_lora": [8]}, "speech_lora.r is None, not a whole number from 1 to 16384."),
        (
            {"speech_lora": {"r": 10, "lora_alpha": float("inf")}},
            "speech_lora.lora_alpha is inf, not a number above 0.",
        ),
        ({"image_token_id": 512}, "image_token_id is 512, no token of a vocabulary of 512."),
        ({"audio_token_id": True}, "audio_token_id is True, no token of a vocabulary of 512."),
        ({"image_token_id": None}, "image_token_id is 200010, no token of a vocabulary of 512."),
        ({"audio_token_id": 510}, "image_token_id and audio_token_id are both 510."),
    ],
)
def test_config_values(config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model({**config, **changes})
    assert str(caught.value) == f"config.json: {message}"


def test_what_the_model_does_without_is_left_aside(
    folder: Path, config: dict[str, Any], weights: Weights, tmp_path: Path
) -> None:
    """Whatever it looks like, and whether it is there or not."""
    tower = "model.embed_tokens_extend.image_embed.img_processor."
    unused = (f"{tower}head.", f"{tower}post_layernorm.", f"{tower}encoder.layers.2.")
    bare = {name: array for name, array in weights.items() if not name.startswith(unused)}
    assert len(weights) - len(bare) == 11 + 2 + 16
    check_same(write(tmp_path / "bare", config, bare), folder)
    odd = {name: mx.zeros((3,)) for name in weights if name.startswith(unused)}
    odd["lm_head.weight"] = weights["model.embed_tokens.weight"]
    check_same(write(tmp_path / "odd", config, {**bare, **odd}), folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.3.layer_norm1.bias",
        "model.embed_tokens_extend.audio_embed.encoder.encoders.0.extra.weight",
        "model.layers.0.self_attn.qkv_proj.lora_A.smell.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
    ],
)
def test_unknown_tensors(
    config: dict[str, Any], weights: Weights, tmp_path: Path, name: str
) -> None:
    error = loading(write(tmp_path, config, {**weights, name: mx.zeros(2)}))
    assert isinstance(error, CheckpointError)
    assert str(error) == (f"The checkpoint holds {name}, which this architecture does not have.")


def test_missing_tensors(config: dict[str, Any], weights: Weights, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.lora_B.speech.weight"
    rest = {n: w for n, w in weights.items() if n != name}
    assert str(loading(write(tmp_path, config, rest))) == f"The checkpoint lacks {name}."


def test_a_quantized_folder_loads_as_it_was_saved(
    folder: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    """The base packed, some of the adapters too, the encoders whole; every number as saved."""
    model = load_model(Checkpoint(folder), mx.bfloat16)
    form = {"group_size": 32, "bits": 4, "mode": "affine"}
    eight = {**form, "bits": 8}

    def chosen(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path.endswith("base_layer") or path == "model.embed_tokens":
            return form
        return eight if ".lora_A." in path else False

    nn.quantize(model, class_predicate=chosen)
    saved = dict(tree_flatten(model.parameters()))
    table = {**form, **{n.removesuffix(".scales"): eight for n in saved if ".lora_A." in n}}
    loaded = load_model(Checkpoint(write(tmp_path, {**config, "quantization": table}, saved)))
    assert isinstance(loaded, Phi4MMForCausalLM)
    arrays = dict(tree_flatten(loaded.parameters()))
    assert arrays.keys() == saved.keys()
    for name, array in saved.items():
        assert arrays[name].dtype == array.dtype
        assert mx.array_equal(arrays[name], array), name
    projection = loaded.layers[1].mlp.down_proj
    assert (projection.base_layer.bits, projection.lora_A["speech"].bits) == (4, 8)
    assert isinstance(projection.lora_B["speech"], nn.Linear)
    tokens = mx.array([[5, 9, 100, 7]])
    assert mx.array_equal(loaded(tokens), model(tokens))


# Conversions that lost the adapters

BAKED_HINT = (
    "Make a conversion that keeps them: phimlx convert microsoft/Phi-4-multimodal-instruct "
    "--mlx-path OUT -q"
)


@pytest.mark.parametrize("names", ["published", "mlx-vlm", "native"])
def test_baked_conversions(
    config: dict[str, Any], weights: Weights, tmp_path: Path, names: str
) -> None:
    base = {n.replace(".base_layer", ""): w for n, w in weights.items() if ".lora_" not in n}
    table = {"quantization": {"group_size": 64, "bits": 8}}
    given: dict[str, Any] = {**config, **table}
    if names == "mlx-vlm":
        base = {f"language_model.{n}": w for n, w in base.items() if n.startswith("model.layers")}
    if names == "native":
        given = {**NATIVE, **table}
    error = loading(write(tmp_path, given, base))
    assert isinstance(error, CheckpointError)
    assert str(error) == (
        f"{tmp_path} holds no adapters: they were merged into its base, where they change every "
        "answer and can no longer be switched."
    )
    assert error.hint == BAKED_HINT
