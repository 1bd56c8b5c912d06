"""Phi-4-multimodal's two layouts: transformers' own names and settings, and the published ones.

Everything else knows the published ones only.
Source: transformers `models/phi4_multimodal/convert_phi4_multimodal_weights_to_hf.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phimlx.errors import ConfigError, shortened
from phimlx.models.names import Paths, Renames

PUBLISHED_TYPE = "phi4mm"

_IMAGE = "model.embed_tokens_extend.image_embed"
_AUDIO = "model.embed_tokens_extend.audio_embed"

# Native path -> published path; `#` is a layer's number. The last part of a tensor's name (weight,
# bias, scales …) is the same in both.
PATHS: Paths = {
    f"{_IMAGE}.img_projection_up": f"{_IMAGE}.img_projection.0",
    f"{_IMAGE}.img_projection_down": f"{_IMAGE}.img_projection.2",
    f"{_AUDIO}.up_proj_for_speech": f"{_AUDIO}.audio_projection.speech.0",
    f"{_AUDIO}.down_proj_for_speech": f"{_AUDIO}.audio_projection.speech.2",
    f"{_AUDIO}.up_proj_for_vision_speech": f"{_AUDIO}.audio_projection.vision.0",
    f"{_AUDIO}.down_proj_for_vision_speech": f"{_AUDIO}.audio_projection.vision.2",
    **{
        f"{_AUDIO}.encoder.encoders.#.{native}": f"{_AUDIO}.encoder.encoders.#.{published}"
        for native, published in {
            "feed_forward_in.gate_up_proj": "feed_forward_in.net.0.linear",
            "feed_forward_in.down_proj": "feed_forward_in.net.2",
            "feed_forward_out.gate_up_proj": "feed_forward_out.net.0.linear",
            "feed_forward_out.down_proj": "feed_forward_out.net.2",
            "self_attn.q_proj": "self_attn.linear_q",
            "self_attn.k_proj": "self_attn.linear_k",
            "self_attn.v_proj": "self_attn.linear_v",
            "self_attn.o_proj": "self_attn.linear_out",
        }.items()
    },
    **{
        f"model.layers.#.{path}": f"model.layers.#.{path}.base_layer"
        for path in (
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        )
    },
}
# Native name -> published name, of what is a tensor itself.
TENSORS = {
    f"{_IMAGE}.global_img_feature_extensor": f"{_IMAGE}.glb_GN",
    f"{_IMAGE}.sub_img_feature_extensor": f"{_IMAGE}.sub_GN",
}

# Native setting of `audio_config` -> its path within the published `audio_processor.config`.
AUDIO_SETTINGS = {
    "hidden_size": ("attention_dim",),
    "num_attention_heads": ("attention_heads",),
    "intermediate_size": ("linear_units",),
    "nemo_conv_channels": ("nemo_conv_settings", "conv_channels"),
    "bias_max_distance": ("relative_attention_bias_args", "t5_bias_max_distance"),
    "depthwise_separable_out_channel": ("depthwise_seperable_out_channel",),
    **{
        key: (key,)
        for key in (
            "activation",
            "conv_activation",
            "conv_glu_type",
            "depthwise_multiplier",
            "ext_pw_out_channel",
            "input_size",
            "kernel_size",
            "num_blocks",
            "time_reduction",
        )
    },
}
# What transformers takes where a native config says nothing, and the published model has otherwise
# or its config must say.
NATIVE_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 1536,
    "nemo_conv_channels": 1024,
    "bias_max_distance": 1000,
    "input_size": 80,
    "kernel_size": 3,
    "num_blocks": 24,
}
# Settings that change the model, each with the one value that we compute.
FIXED_AUDIO: dict[str, Any] = {
    "bias_symmetric": False,
    "chunk_size": -1,
    "downsample_rate": 1,
    "feature_layer": -2,
    "nemo_activation": "relu",
}
# The published adapters, for folders that do not say: the conversion leaves them out of the config.
PUBLISHED_LORA = {
    "vision": {"r": 256, "lora_alpha": 512},
    "speech": {"r": 320, "lora_alpha": 640},
}
# Variants of LoRA that an adapter's own config may ask for and that are not computed here.
FIXED_LORA: dict[str, tuple[Any, ...]] = {
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "bias": ("none", None),
}


def native_renames(config: Mapping[str, Any]) -> Renames:
    """Make the table of tensor names, from transformers' to the published ones."""
    return Renames(PATHS, TENSORS)


def published_config(
    config: Mapping[str, Any], adapters: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """A native config in the published layout's terms.

    Args:
        adapters: the `adapter_config.json` of each adapter that has one.

    Raises:
        ConfigError: for settings that the published model does not have.
    """
    vision = _table(config, "vision_config")
    audio = _table(config, "audio_config")
    for key, value in FIXED_AUDIO.items():
        if audio.get(key, value) != value:
            raise ConfigError(
                f"config.json: audio_config.{key} is {shortened(audio[key])}, but Phi-4-multimodal "
                f"has {shortened(value)}."
            )
    encoder: dict[str, Any] = {}
    for key, (*tables, last) in AUDIO_SETTINGS.items():
        value = audio.get(key, NATIVE_DEFAULTS.get(key))
        if value is not None:
            place = encoder
            for table in tables:
                place = place.setdefault(table, {})
            place[last] = value
    published = {
        key: value for key, value in config.items() if key not in ("vision_config", "audio_config")
    }
    ids = {
        "image_token_id": config.get("image_token_id", vision.get("image_token_id")),
        "audio_token_id": config.get("audio_token_id", audio.get("audio_token_id")),
    }
    return {
        **published,
        "model_type": PUBLISHED_TYPE,
        "architectures": ["Phi4MMForCausalLM"],
        "vision_config": {k: v for k, v in vision.items() if k not in ("model_type", *ids)},
        "audio_processor": {"name": "cascades", "config": encoder},
        "vision_lora": _lora(config, "vision", adapters or {}),
        "speech_lora": _lora(config, "speech", adapters or {}),
        **{key: value for key, value in ids.items() if value is not None},
    }


def _lora(
    config: Mapping[str, Any], adapter: str, adapters: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Any]:
    own = adapters.get(adapter)
    if own is None:
        return config.get(f"{adapter}_lora") or PUBLISHED_LORA[adapter]
    for key, allowed in FIXED_LORA.items():
        if own.get(key) not in allowed:
            raise ConfigError(
                f"{adapter}-lora/adapter_config.json: {key} is {shortened(own[key])}, "
                "but Phi-4-multimodal's adapters are plain LoRA."
            )
    return {"r": own.get("r"), "lora_alpha": own.get("lora_alpha")}


def _table(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = config.get(key) or {}
    if not isinstance(table, Mapping):
        raise ConfigError(f"config.json: {key} is {shortened(table)}, not a table of values.")
    return table
