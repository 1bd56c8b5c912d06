"""The settings of a GGUF file -> a config in its architecture's own terms."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from phimlx.checkpoint.gguf.header import GgufTensor, Setting
from phimlx.errors import CheckpointError, ConfigError, shortened
from phimlx.models.registry import GGUF, Architecture
from phimlx.models.rope import longrope_attention_factor

# The setting that holds the norms' epsilon, and its key in a config.
NORMS = {
    "rms": ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    "layer": ("attention.layer_norm_epsilon", "layer_norm_eps"),
}
# Settings that change a model and of which we compute some values only.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attention.scale": (0,),
    "rope.scaling.finetuned": (True, False),
}
# Special tokens, by their keys in a config.
TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
}
ROPE_TYPES = ("none", "longrope")

# Tensors of the rotary embedding, which are part of a config.
LONG, SHORT, ALWAYS = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
ROPE_TENSORS = (LONG, SHORT, ALWAYS)

# Phi-3's window at 4096 positions, which files before August 2024 do not name.
# Source: llama.cpp, pull request 8931.
PHI3_WINDOW = {4096: 2047}


def read_config(
    settings: Mapping[str, Setting],
    architecture: Architecture,
    form: GGUF,
    tensors: Mapping[str, GgufTensor],
    factors: Mapping[str, list[float]],
) -> dict[str, Any]:
    """Write what a file says of a model as its config.json would, in Hub terms.

    Args:
        factors: values of those of `ROPE_TENSORS` that the file holds.

    Raises:
        ConfigError: naming the setting, where one is missing or changes the model in a way that is
            not computed.
    """
    values = _Settings(settings, form.architecture)
    values.check_fixed()
    heads = values.whole("attention.head_count")
    hidden = values.whole("embedding_length")
    kv_heads = values.whole("attention.head_count_kv", heads)
    head_dim = values.whole("attention.key_length", hidden // max(heads, 1))
    value_dim = values.whole("attention.value_length", hidden // max(heads, 1))
    if value_dim != head_dim:
        raise ConfigError(
            f"{values.key('attention.value_length')} is {value_dim}, and keys have {head_dim}."
        )
    epsilon, epsilon_key = NORMS[form.norm]
    embedding = tensors.get(f"{form.tensors['model.embed_tokens']}.weight")
    if embedding is None:
        raise CheckpointError("The file holds no embedding, so it is not a whole model.")
    context = values.whole("context_length")
    config: dict[str, Any] = {
        "architectures": [architecture.model.rpartition(":")[2]],
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "intermediate_size": values.whole("feed_forward_length"),
        "num_hidden_layers": values.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": context,
        "tie_word_embeddings": f"{form.tensors['lm_head']}.weight" not in tensors,
        epsilon_key: values.number(epsilon),
    }
    if head_dim * heads != hidden:
        config["head_dim"] = head_dim
    if form.sliding_window:
        window = values.whole("attention.sliding_window", PHI3_WINDOW.get(context, 0))
        config["sliding_window"] = window or None
    name = settings.get("general.name")
    if isinstance(name, str):  # which helps to find its prompt form
        config["_name_or_path"] = re.sub(r"[^\w.-]+", "-", name)[:100]
    for name, key in TOKENS.items():
        found = settings.get(f"tokenizer.ggml.{name}")
        if type(found) is int and found < embedding.shape[0]:
            config[key] = found
    return config | _rope(values, form, head_dim, context, factors)


def _rope(
    values: _Settings,
    form: GGUF,
    head_dim: int,
    context: int,
    factors: Mapping[str, list[float]],
) -> dict[str, Any]:
    """The rotary embedding, by the keys of a config in Hub terms."""
    dims = values.whole("rope.dimension_count", head_dim)
    if form.paired_rows and dims != head_dim:
        raise ConfigError(
            f"{values.key('rope.dimension_count')} is {dims}, and heads of {head_dim} turn as a "
            f"whole in files of {form.architecture}."
        )
    kind = values.text("rope.scaling.type", "none")
    if kind not in ROPE_TYPES and values.number("rope.scaling.factor", 1.0) != 1:
        raise ConfigError(
            f"{values.key('rope.scaling.type')} is {shortened(kind)}, and LongRoPE is the only "
            "scaling that is read of GGUF files."
        )
    original = values.whole("rope.scaling.original_context_length", context)
    rope: dict[str, Any] = {
        "rope_theta": values.number("rope.freq_base", 10000.0),
        "partial_rotary_factor": _part(dims, head_dim),
        "original_max_position_embeddings": original,
        "rope_scaling": None,
    }
    always = factors.get(ALWAYS, [])
    if any(factor != 1 for factor in always):  # at any length: long and short are the same
        rope["original_max_position_embeddings"] = context
        rope["rope_scaling"] = _scaling(always, always, 1.0)
        return rope
    if LONG in factors or SHORT in factors:
        missing = [name for name in (LONG, SHORT) if name not in factors]
        if missing:
            raise CheckpointError(f"The file lacks {missing[0]}, beside the other factors.")
        scale = values.number("rope.scaling.attn_factor", 0.0)
        derived = longrope_attention_factor(context / original, original) if original > 1 else 0.0
        # As it follows from the lengths, but for its rounding, it is left to follow from them.
        own = None if scale in (0.0, float(np.float32(derived))) else scale
        if own is not None and math.isclose(own, derived, rel_tol=1e-6):
            own = None
        rope["rope_scaling"] = _scaling(factors[LONG], factors[SHORT], own)
    return rope


def _scaling(long: list[float], short: list[float], scale: float | None) -> dict[str, Any]:
    table: dict[str, Any] = {"type": "longrope", "long_factor": long, "short_factor": short}
    return table if scale is None else {**table, "attention_factor": scale}


def _part(dims: int, head_dim: int) -> float:
    """The part of a head that turns, such that its product with the whole is not below `dims`."""
    part = dims / head_dim if head_dim else 0.0
    return part if int(head_dim * part) == dims else math.nextafter(part, math.inf)


def shortest(value: float) -> float:
    """The number that a float32 was made from: 1e-05, not 9.999999747378752e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


class _Settings:
    """Settings of one architecture, each read as the number or text that it must be."""

    def __init__(self, settings: Mapping[str, Setting], architecture: str) -> None:
        self._settings, self._architecture = settings, architecture

    def key(self, name: str) -> str:
        return f"{self._architecture}.{name}"

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number; a list, one for each layer, must have one value."""
        value = self._get(name, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"{self.key(name)} is {shortened(value)}, not one whole number.")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) < math.inf:
            raise ConfigError(f"{self.key(name)} is {shortened(value)}, not a number.")
        found = shortest(float(value))
        if not math.isfinite(found):
            raise ConfigError(f"{self.key(name)} is {shortened(value)}, not a number of 32 bits.")
        return found

    def text(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise ConfigError(f"{self.key(name)} is {shortened(value)}, not text.")
        return value

    def check_fixed(self) -> None:
        """Raise ConfigError for a setting of another model than we compute."""
        for name, allowed in FIXED.items():
            value = self._settings.get(self.key(name), allowed[0])
            if isinstance(value, np.ndarray | list) or value not in allowed:
                raise ConfigError(
                    f"{self.key(name)} is {shortened(value)}, but Phi models have {allowed[0]}."
                )

    def _get(self, name: str, default: Any) -> Any:
        value = self._settings.get(self.key(name), default)
        if value is None:
            raise ConfigError(f"{self.key(name)} is missing.")
        return value
