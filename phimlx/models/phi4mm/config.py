"""The shapes of Phi-4-multimodal's two encoders, from a `config.json` in the published layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phimlx.machine.memory import picture_bytes, sound_bytes
from phimlx.models.config_table import ConfigTable

MODEL = "Phi-4-multimodal"
DYNAMIC_HD = 36  # most crops of one image

# What the published code hard-codes of the tower.
VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 448,
}

# Keys that change a network, with the only value that the family uses.
FIXED_VISION: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "feature_layer": -2,
}
FIXED_AUDIO: dict[str, Any] = {
    "activation": "swish",
    "conv_activation": "swish",
    "conv_glu_type": "swish",
    "bias_in_glu": True,
    "batch_norm": False,
    "causal": True,
    "chunk_size": -1,
    "cnn_layer_norm": True,
    "depthwise_multiplier": 1,
    "ext_pw_kernel_size": 1,
    "input_layer": "nemo_conv",
    "time_reduction": 8,
}
FIXED_BIAS: dict[str, Any] = {"type": "t5", "t5_bias_symmetric": False}


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the tower. `num_hidden_layers` counts the last layer, which nothing uses."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VisionConfig:
        """Read `vision_config`; the published values apply where it, or a key of it, is absent.

        Raises:
            ConfigError: naming the key, where a value cannot be.
        """
        given = ConfigTable(config, MODEL).table("vision_config", optional=True)
        given.check(FIXED_VISION)
        made = cls(**{key: given.count(key, default) for key, default in VISION.items()})
        given.check({"crop_size": made.image_size})
        given.check_multiple("hidden_size", made.hidden_size, made.num_attention_heads)
        given.check_multiple("image_size", made.image_size, 2 * made.patch_size)
        return made

    @property
    def side(self) -> int:
        """Patches along one side of a crop."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class AudioConfig:
    """Shape of the conformer, under the names of `audio_processor.config`."""

    attention_dim: int
    attention_heads: int
    linear_units: int
    num_blocks: int
    input_size: int
    kernel_size: int
    conv_channels: int
    t5_bias_max_distance: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AudioConfig:
        """Read `audio_processor.config`.

        Raises:
            ConfigError: naming the key, where a value is missing or cannot be.
        """
        given = ConfigTable(config, MODEL).table("audio_processor").table("config")
        given.check(FIXED_AUDIO)
        bias = given.table("relative_attention_bias_args")
        bias.check(FIXED_BIAS)
        counted = (
            "attention_dim", "attention_heads", "linear_units", "num_blocks", "input_size",
            "kernel_size",
        )  # fmt: skip
        made = cls(
            **{key: given.count(key) for key in counted},
            conv_channels=given.table("nemo_conv_settings").count("conv_channels"),
            t5_bias_max_distance=bias.count("t5_bias_max_distance"),
        )
        given.check_multiple("attention_dim", made.attention_dim, made.attention_heads)
        width = made.attention_dim
        given.check({"ext_pw_out_channel": width, "depthwise_seperable_out_channel": width})
        return made


def image_memory(shape: Any, itemsize: int, tokens: int | None = None) -> dict[str, int]:
    """Estimate what the largest image takes; arguments as in `Architecture.largest_image`."""
    # The catalogue holds published models, which have the published tower.
    vision = getattr(shape, "vision", None) or VisionConfig.from_dict({})
    crops = DYNAMIC_HD
    if tokens is not None:  # every row of features has one more at its end
        of_crop = vision.side // 2 * (vision.side // 2 + 1)
        crops = max(1, math.ceil((tokens - 1) / of_crop) - 1)  # without the global view
    return {"crops": crops, "working": picture_bytes(vision, crops, itemsize)}


def sound_memory(shape: Any, itemsize: int, tokens: int) -> int:
    """Estimate what the longest sound takes; arguments as in `Architecture.longest_sound`."""
    return sound_bytes(shape.audio, tokens, itemsize)
