"""Llama's and Mistral's layout of phi3 models: split projections, other names of settings.

Their decoder is phi3's, computed in the same order, so that Phi models are published in it too
(unsloth/phi-4, unsloth/Phi-3.5-mini-instruct).
Source: transformers `models/llama/modeling_llama.py`, `models/mistral/modeling_mistral.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phimlx.errors import ConfigError, shortened
from phimlx.models.config import check_fixed, rope_values

OWN_TYPE = "phi3"

# What transformers takes where a config says nothing, and a phi3 config must say or has otherwise.
LLAMA_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
MISTRAL_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
# Settings of Llama's that change the model and that phi3's config does not have.
FIXED: dict[str, tuple[Any, ...]] = {"pretraining_tp": (1,)}


def llama_config(
    config: Mapping[str, Any], adapters: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Write a Llama config in phi3's terms.

    Raises:
        ConfigError: for settings that phi3 has not.
    """
    own = _own_config(config, LLAMA_DEFAULTS)
    own["sliding_window"] = None  # which Llama does not have, whatever a config says
    return own


def mistral_config(
    config: Mapping[str, Any], adapters: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Write a Mistral config in phi3's terms.

    Raises:
        ConfigError: for settings that phi3 has not.
    """
    return _own_config(config, MISTRAL_DEFAULTS)


def split_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Write a phi3 config in Llama's terms, or in Mistral's where there is a window.

    Args:
        config: in the Hub's dialect.

    Raises:
        ConfigError: where the model turns some channels of each head only, which neither does.
    """
    partial = rope_values(config).get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ConfigError(
            f"config.json: partial_rotary_factor is {shortened(partial)}, which neither Llama's "
            "shape nor Mistral's can tell.",
            hint="Leave --split-projections out.",
        )
    window = config.get("sliding_window")
    own = ("sliding_window", "partial_rotary_factor", "full_attn_mod", "interpolate_factor")
    shared = {key: value for key, value in config.items() if key not in (*own, "lm_head_bias")}
    if window is not None and window < config["max_position_embeddings"]:
        named = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        return {**shared, **named, "sliding_window": window}
    named = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return {**shared, **named, "attention_bias": False, "mlp_bias": False}


def _own_config(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    check_fixed(config, FIXED)
    partial = rope_values(config).get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ConfigError(
            f"config.json: partial_rotary_factor is {shortened(partial)}, but "
            f"{config['model_type']} models turn all channels."
        )
    own = {key: value for key, value in config.items() if key not in FIXED}
    return {**defaults, **own, "model_type": OWN_TYPE, "architectures": ["Phi3ForCausalLM"]}
