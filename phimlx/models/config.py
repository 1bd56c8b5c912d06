"""A model folder's `config.json`, in either dialect, as one checked set of values.

Source of the rope settings: transformers `modeling_rope_utils.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from phimlx.errors import ConfigError, shortened
from phimlx.models.rope import Rope, longrope_attention_factor
from phimlx.models.rope_scaling import (
    SCALINGS,
    DynamicScaling,
    LinearScaling,
    Scaling,
    YarnScaling,
    yarn_attention_factor,
)

# Largest believable values: a hostile config must not make us build a billion layers.
LIMITS = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
    "original_max_position_embeddings": 1 << 30,
    "sliding_window": 1 << 30,
}

SMALLEST, LARGEST = 1e-37, 1e38  # numbers that float32 holds in full precision

ROPE_KEYS = {
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "short_factor",
    "long_factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "factor",
    "attention_factor",
}
YARN_KEYS = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
ROPE_TYPES = {
    "default": "default",
    "longrope": "longrope",
    "su": "longrope",
    **{kind: kind for kind in SCALINGS},
}
MAX_FACTOR, MAX_THETA = 4096, 1e12  # of a scaling
YARN_USUAL = {"beta_fast": 32.0, "beta_slow": 1.0}


@dataclass(frozen=True)
class ModelConfig(ABC):
    """Shape of a decoder, under the checkpoint's own names; every architecture adds its own.

    Attributes:
        norm_eps: added to the variance in every norm.
        max_position_embeddings: tokens of the longest sequence, as far as a scaled rotary embedding
            reaches.
        rope: rotary position embedding of queries and keys.
        sliding_window: how many tokens each attends to, itself and those before it; None for all.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    norm_eps: float
    rope: Rope
    sliding_window: int | None

    @classmethod
    @abstractmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a Hub config (`rope_scaling`, `rope_theta`) or a transformers 5 one
        (`rope_parameters`).

        Raises:
            ConfigError: naming the key, where a value is missing, unknown or contradicts another.
        """

    @property
    @abstractmethod
    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each of a layer's projections, by path, in calling order."""

    @property
    def layer_shapes(self) -> list[dict[str, tuple[int, int]]]:
        """The same of each layer, of the projections that it has."""
        return [self.projection_shapes] * self.num_hidden_layers

    def mixer_numbers(self, length: int) -> int:
        """Estimate the numbers of a token that what mixes tokens keeps for the backward pass."""
        attention = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        return (
            (attention + 2 * keys)  # queries, keys and values
            + (attention + keys)  # rotated
            + self.num_attention_heads * length  # scores
            + 2 * attention  # what comes of them, and with heads side by side
        )

    @property
    def kv_layers(self) -> int:
        """How many layers keep keys and values of every token."""
        return self.num_hidden_layers

    def constant_cache_bytes(self, itemsize: int) -> int:
        """Count the bytes that a cache takes however long a sequence is; 0 for most."""
        return 0

    @property
    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """Rows of the pieces that each fused projection holds, by its path, one below the other."""
        return {}


def read_decoder(
    config: Mapping[str, Any], norm_eps: str, partial_rotary_factor: float = 1.0
) -> dict[str, Any]:
    """Read the fields of `ModelConfig`.

    Args:
        norm_eps: the key of the norms' epsilon.
        partial_rotary_factor: where the config says nothing of it.
    """
    hidden_size = read_count(config, "hidden_size")
    heads = read_count(config, "num_attention_heads")
    kv_heads = read_count(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads ({heads}) is not a multiple of "
            f"num_key_value_heads ({kv_heads})."
        )
    if config.get("head_dim") is None and hidden_size % heads:
        raise ConfigError(
            f"config.json: hidden_size ({hidden_size}) is not a multiple of "
            f"num_attention_heads ({heads})."
        )
    head_dim = read_count(config, "head_dim", hidden_size // heads)
    max_positions = read_count(config, "max_position_embeddings")
    window = config.get("sliding_window")
    if window is not None:
        window = read_count(config, "sliding_window")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ConfigError(
            f"config.json: tie_word_embeddings is {shortened(tied)}, not true or false."
        )
    rope = read_rope(config, head_dim, max_positions, partial_rotary_factor)
    if rope.scaling is not None:
        reached = int(rope.scaling.factor * rope.scaling.original)
        max_positions = min(max(max_positions, reached), LIMITS["max_position_embeddings"])
    return {
        "hidden_size": hidden_size,
        "intermediate_size": read_count(config, "intermediate_size"),
        "num_hidden_layers": read_count(config, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": read_count(config, "vocab_size"),
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "norm_eps": read_number(norm_eps, config.get(norm_eps, 1e-5)),
        "rope": rope,
        "sliding_window": window,
    }


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    """Check keys that change a model and of which we compute some values only.

    Args:
        fixed: the values of each, the one that it has where it is absent first.
    """
    for key, allowed in fixed.items():
        if config.get(key, allowed[0]) not in (None, *allowed):
            expected = " or ".join(map(repr, allowed))
            raise ConfigError(
                f"config.json: {key} is {shortened(config[key])}, but Phi models have {expected}."
            )


def read_rope(
    config: Mapping[str, Any], head_dim: int, max_positions: int, partial: float = 1.0
) -> Rope:
    """Read the rotary embedding that a config asks for, in either dialect.

    Args:
        partial: the part of each head that turns where the config does not say.

    A value that stands in several places must be the same in all of them.
    """
    values = rope_values(config)
    kind = ROPE_TYPES[values.get("rope_type", "default")]
    partial = read_number("partial_rotary_factor", values.get("partial_rotary_factor", partial))
    theta = read_number("rope_theta", values.get("rope_theta", 10000.0))
    dims = int(head_dim * partial)
    if not 0 < dims <= head_dim or dims % 2:
        raise ConfigError(
            f"config.json: partial_rotary_factor ({partial}) turns {dims} of {head_dim} channels; "
            "it must be an even number of them, and not none."
        )
    if kind == "default":
        return Rope(dims, theta)
    if kind in SCALINGS:
        scaling, attention = _read_scaling(values, kind, dims, theta, max_positions)
        return Rope(dims, theta, attention_factor=attention, scaling=scaling)
    original = read_count(values, "original_max_position_embeddings")
    if original > max_positions:
        raise ConfigError(
            f"config.json: original_max_position_embeddings ({original}) is above "
            f"max_position_embeddings ({max_positions})."
        )
    factors = {key: _factors(values, key, dims // 2) for key in ("short_factor", "long_factor")}
    scale = values.get("attention_factor")
    if scale is None:
        factor = read_number("factor", values.get("factor") or max_positions / original)
        if original == 1 and factor > 1:
            raise ConfigError(
                "config.json: original_max_position_embeddings is 1, from which no "
                "attention_factor follows."
            )
        scale = longrope_attention_factor(factor, original)
    return Rope(
        dims,
        theta,
        short_factor=factors["short_factor"],
        long_factor=factors["long_factor"],
        original_max_position_embeddings=original,
        attention_factor=read_number("attention_factor", scale),
    )


def _read_scaling(
    values: Mapping[str, Any], kind: str, dims: int, theta: float, max_positions: int
) -> tuple[Scaling, float]:
    """Read a scaling of a plain rotary embedding, and its scale of cos and sin."""
    original = read_count(values, "original_max_position_embeddings", max_positions)
    given = values.get("factor")
    if given is None and kind == "yarn":
        given = max_positions / original
    factor = read_number("factor", given)
    if not 1 <= factor <= MAX_FACTOR:
        raise ConfigError(
            f"config.json: factor is {shortened(given)}, not a number from 1 to {MAX_FACTOR}."
        )
    if not 1 < theta <= MAX_THETA:
        raise ConfigError(f"config.json: rope_theta is {theta}, with which {kind} has no meaning.")
    if kind == "linear":
        return LinearScaling(factor, original), 1.0
    if kind == "dynamic":
        if dims <= 2:
            raise ConfigError("config.json: dynamic scaling needs more than 2 channels that turn.")
        return DynamicScaling(factor, max_positions), 1.0
    truncate = values.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"config.json: truncate is {shortened(truncate)}, not true or false.")
    # 0 means the usual value, as in transformers.
    betas = {key: read_number(key, values.get(key) or usual) for key, usual in YARN_USUAL.items()}
    scale: Any = values.get("attention_factor")
    if scale is None:
        weights = {key: values.get(key) for key in ("mscale", "mscale_all_dim")}
        both = all(weights.values())
        scale = yarn_attention_factor(
            factor, *(read_number(key, value) for key, value in weights.items() if both)
        )
    scaling = YarnScaling(factor, original, **betas, truncate=truncate)
    return scaling, read_number("attention_factor", scale)


def with_rope_scaling(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Put a scaling of the rotary embedding in place of a config's own.

    Args:
        scaling: as in `rope_scaling` of a config.

    Raises:
        ConfigError: for a model that is made for long texts already.
    """
    values = rope_values(config)
    if values.get("rope_type") == "longrope":
        raise ConfigError(
            "This model has LongRoPE, which it was trained with: no other scaling goes with it.",
            hint="Leave the rope scaling out.",
        )
    scaled = {key: value for key, value in config.items() if key != "rope_parameters"}
    scaled |= {key: values[key] for key in ("rope_theta", "partial_rotary_factor") if key in values}
    scaled["rope_scaling"] = dict(scaling)
    if rope_values(scaled).get("rope_type") == "longrope":
        raise ConfigError("LongRoPE's factors are a model's own, and cannot be put on another.")
    return scaled


def rope_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every rope setting of a config, whichever dialect it is written in, under one name each.

    Raises:
        ConfigError: for an unknown setting, or two places that disagree.
    """
    values: dict[str, Any] = {}

    def put(key: str, value: Any, place: str) -> None:
        if value is None:
            return
        if key in values and values[key][0] != value:
            raise ConfigError(
                f"config.json: {place} is {shortened(value)}, but {values[key][1]} is "
                f"{shortened(values[key][0])}."
            )
        values.setdefault(key, (value, place))

    for table in ("rope_scaling", "rope_parameters"):
        settings = config.get(table)
        if settings is None:
            continue
        if not isinstance(settings, Mapping):
            raise ConfigError(
                f"config.json: {table} is {shortened(settings)}, not a table of values."
            )
        for key in ("type", "rope_type"):
            if key in settings:
                put("rope_type", _rope_type(settings, f"{table}.{key}", key), f"{table}.{key}")
        is_yarn = values.get("rope_type", ("",))[0] == "yarn"
        for key, value in settings.items():
            place = f"{table}.{key}"
            if key not in ROPE_KEYS and not (is_yarn and key in YARN_KEYS):
                raise ConfigError(f"config.json: {place} is not a setting that Phi-4 models use.")
            if key not in ("type", "rope_type"):
                put(key, value, place)
    top_level = ["rope_theta", "partial_rotary_factor", "max_position_embeddings"]
    if values.get("rope_type", ("default",))[0] != "default":
        top_level.append("original_max_position_embeddings")
    elif "long_factor" in values or "short_factor" in values:
        raise ConfigError("config.json: long and short factors are given, but no rope type.")
    for key in top_level:
        put(key, config.get(key), key)
    return {key: value for key, (value, _) in values.items()}


def _rope_type(settings: Mapping[str, Any], place: str, key: str) -> str:
    """Read a type; "yarn" beside LongRoPE's factors is what Phi-3 called LongRoPE at first."""
    value = settings[key]
    if not isinstance(value, str) or value not in ROPE_TYPES:
        known = " or ".join(map(repr, dict.fromkeys(ROPE_TYPES.values())))
        raise ConfigError(
            f"config.json: {place} is {shortened(value)}, but Phi models have {known}."
        )
    return "longrope" if value == "yarn" and "long_factor" in settings else ROPE_TYPES[value]


def hub_dialect(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config written the Hub's way, which every tool reads.

    `rope_parameters` becomes `rope_theta`, `partial_rotary_factor` and `rope_scaling`; `dtype`
    becomes `torch_dtype`. Everything else is kept.
    """
    values = rope_values(config)
    hub = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype")}
    if "dtype" in config:
        hub.setdefault("torch_dtype", config["dtype"])
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if key in values:
            hub[key] = values[key]
    kind = values.get("rope_type", "default")
    if kind == "default":
        hub["rope_scaling"] = None
        return hub
    elsewhere = ("rope_type", "rope_theta", "partial_rotary_factor", "max_position_embeddings")
    scaling = {key: value for key, value in values.items() if key not in elsewhere}
    if kind == "longrope":
        scaling.pop("original_max_position_embeddings", None)
    hub["rope_scaling"] = {"type" if kind == "longrope" else "rope_type": kind, **scaling}
    return hub


def read_count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Read a whole number from 1 to its limit."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"config.json: {key} is missing.")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LIMITS[key]:
        raise ConfigError(
            f"config.json: {key} is {shortened(value)}, not a whole number from 1 to {LIMITS[key]}."
        )
    return value


def read_number(key: str, value: Any) -> float:
    """Check a number above 0 that float32 holds."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ConfigError(f"config.json: {key} is {shortened(value)}, not a number above 0.")
    if not SMALLEST <= value <= LARGEST:
        raise ConfigError(
            f"config.json: {key} is {shortened(value)}, not a number from {SMALLEST} to {LARGEST}."
        )
    return float(value)


def _factors(values: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    factors = values.get(key)
    if not isinstance(factors, list) or len(factors) != count:
        length = f"has {len(factors)}" if isinstance(factors, list) else "has none"
        raise ConfigError(
            f"config.json: {key} needs {count} numbers, one a frequency; it {length}."
        )
    return tuple(read_number(key, factor) for factor in factors)
