"""The shape of Phi-4-reasoning-vision, from a `config.json` as published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from phimlx.errors import ConfigError
from phimlx.machine.memory import patches_bytes
from phimlx.models.config_table import ConfigTable
from phimlx.models.phi3 import Phi3Config

MODEL = "Phi-4-reasoning-vision"
IMAGE = -200  # stands for a picture in `input_ids`; no token of the vocabulary
MAX_PATCHES = 3600  # of one picture, where the config does not say

# What the published config leaves to transformers' `Siglip2VisionConfig`, and what it says.
VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 16,
    "num_patches": 256,
}

# Keys that change a network, with the only value that the model uses.
FIXED_VISION: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
}
FIXED: dict[str, Any] = {"mm_projector_type": "mlp2x_gelu", "use_s2": False, "use_mm_proj": True}


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the tower. `num_hidden_layers` counts the last layer, which nothing uses."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    num_patches: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VisionConfig:
        """Read `vision_config`; the published values apply where it, or a key of it, is absent.

        Raises:
            ConfigError: naming the key, where a value cannot be.
        """
        given = ConfigTable(config, MODEL).table("vision_config", optional=True)
        given.check(FIXED_VISION)
        made = cls(**{key: given.count(key, default) for key, default in VISION.items()})
        given.check_multiple("hidden_size", made.hidden_size, made.num_attention_heads)
        if made.num_hidden_layers < 2:
            raise ConfigError("config.json: vision_config.num_hidden_layers is 1, not 2 or more.")
        if made.side**2 != made.num_patches:
            raise ConfigError(
                f"config.json: vision_config.num_patches is {made.num_patches}, not the square of "
                "a whole number."
            )
        return made

    @property
    def side(self) -> int:
        """Positions along one side of the grid that is stretched over a picture."""
        return round(self.num_patches**0.5)


@dataclass(frozen=True)
class Phi4SiglipConfig(Phi3Config):
    """A phi-4 shape, and the shape of what sees.

    Attributes:
        max_num_patches: of one picture.
        longest_with_media: tokens that are read of a prompt with pictures; None for all.
    """

    vision: VisionConfig
    max_num_patches: int
    longest_with_media: int | None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a config in the published layout.

        Raises:
            ConfigError: naming the key, where a value is missing, unknown or contradicts another.
        """
        text = Phi3Config.from_dict(config)
        vision = VisionConfig.from_dict(config)
        table = ConfigTable(config, MODEL)
        table.check({**FIXED, "mm_hidden_size": vision.hidden_size})
        longest = config.get("tokenizer_model_max_length")
        return cls(
            **{field.name: getattr(text, field.name) for field in fields(Phi3Config)},
            vision=vision,
            max_num_patches=table.count("max_num_patches", MAX_PATCHES),
            longest_with_media=longest and table.count("tokenizer_model_max_length"),
        )


def image_memory(shape: Any, itemsize: int, tokens: int | None = None) -> dict[str, int]:
    """Estimate what the largest image takes; arguments as in `Architecture.largest_image`."""
    # The catalogue holds the published model, which has the published tower.
    vision = getattr(shape, "vision", None) or VisionConfig.from_dict({})
    patches: int = getattr(shape, "max_num_patches", MAX_PATCHES) if tokens is None else tokens
    return {"patches": patches, "working": patches_bytes(vision, patches, itemsize)}
