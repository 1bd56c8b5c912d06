"""Phi-4-multimodal: the phi3 architecture with two encoders and one adapter for each.

Fields carry the published checkpoint's names. Source: the checkpoint's own `modeling_phi4mm.py`;
arXiv 2503.01743, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from phimlx.errors import ConfigError, shortened
from phimlx.models.features import ADAPTERS, Features, Placeholders
from phimlx.models.lora import MAX_RANK, LoRALinear
from phimlx.models.multimodal import MultimodalLM, given, needed
from phimlx.models.phi3 import Phi3Config, Phi3Model
from phimlx.models.phi4mm.audio import AudioConfig, AudioEmbedding, audio_layouts
from phimlx.models.phi4mm.vision import ImageEmbedding, VisionConfig, image_layouts

# What the checkpoint's code hard-codes, for configs that do not say it.
PUBLISHED_IDS = {"image_token_id": 200010, "audio_token_id": 200011}


@dataclass(frozen=True)
class Phi4MMConfig(Phi3Config):
    """A phi3 shape, and the shapes of what sees, hears and adapts."""

    vision: VisionConfig
    audio: AudioConfig
    adapters: Mapping[str, tuple[int, float]]
    image_token_id: int
    audio_token_id: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a config in the published layout.

        Raises:
            ConfigError: naming the key, where a value is missing, unknown or contradicts another.
        """
        text = Phi3Config.from_dict(config)
        placeholders = _read_placeholders(config, text.vocab_size)
        return cls(
            **{field.name: getattr(text, field.name) for field in fields(Phi3Config)},
            vision=VisionConfig.from_dict(config),
            audio=AudioConfig.from_dict(config),
            adapters={name: _read_adapter(f"{name}_lora", config) for name in ADAPTERS},
            image_token_id=placeholders.image,
            audio_token_id=placeholders.audio,
        )

    @property
    def placeholders(self) -> Placeholders:
        """The tokens that pictures and sounds stand at."""
        return Placeholders(self.image_token_id, self.audio_token_id, ADAPTERS)


def _read_adapter(key: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Read the rank and the scale alpha / rank of `{"r": …, "lora_alpha": …}`."""
    table = config.get(key)
    values: Mapping[str, Any] = table if isinstance(table, Mapping) else {}
    rank: Any = values.get("r")
    alpha: Any = values.get("lora_alpha")
    if type(rank) is not int or not 0 < rank <= MAX_RANK:
        raise ConfigError(
            f"config.json: {key}.r is {shortened(rank)}, not a whole number from 1 to {MAX_RANK}."
        )
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise ConfigError(
            f"config.json: {key}.lora_alpha is {shortened(alpha)}, not a number above 0."
        )
    return rank, alpha / rank


def _read_placeholders(config: Mapping[str, Any], vocabulary: int) -> Placeholders:
    tokens = []
    for key, published in PUBLISHED_IDS.items():
        value = config.get(key)
        value = published if value is None else value
        if type(value) is not int or not 0 <= value < vocabulary:
            raise ConfigError(
                f"config.json: {key} is {shortened(value)}, no token of a vocabulary of "
                f"{vocabulary}."
            )
        tokens.append(value)
    image, audio = tokens
    if image == audio:
        raise ConfigError(f"config.json: image_token_id and audio_token_id are both {value}.")
    return Placeholders(image, audio, ADAPTERS)


class ImageAudioEmbedding(nn.Module):
    """Everything that is not text, to rows of the language model."""

    def __init__(self, config: Phi4MMConfig) -> None:
        super().__init__()
        self.image_embed = ImageEmbedding(config.vision, config.hidden_size)
        self.audio_embed = AudioEmbedding(config.audio, config.hidden_size)


class Phi4MMModel(Phi3Model):
    """Embeddings and decoder layers whose projections have adapters."""

    def __init__(self, config: Phi4MMConfig) -> None:
        def linear(input_dims: int, output_dims: int) -> nn.Module:
            return LoRALinear.empty(input_dims, output_dims, config.adapters)

        super().__init__(config, linear)
        self.embed_tokens_extend = ImageAudioEmbedding(config)


class Phi4MMForCausalLM(MultimodalLM):
    """A multimodal model. Parameters carry the names and shapes of the published checkpoint.

    A row's adapter is `vision` where it holds a picture, else `speech` where it holds sound, else
    none.
    """

    model_type = "phi4mm"
    config: Phi4MMConfig

    def __init__(self, config: Phi4MMConfig) -> None:
        super().__init__()
        self.config = config
        self.placeholders = config.placeholders
        self.model = Phi4MMModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def feature_widths(self) -> tuple[int, int]:
        return self.config.hidden_size, self.config.audio.attention_dim

    def encode_media(self, **inputs: mx.array | None) -> Features:
        """Run the encoders, once; arguments as for `encode_frozen`."""
        found = self.encode_frozen(**inputs)
        images = None if found.images is None else self.project_images(found.images)
        return Features(images, found.audio)

    def encode_frozen(  # type: ignore[override]  # the processor's own names
        self,
        *,
        input_image_embeds: mx.array | None = None,
        image_sizes: mx.array | None = None,
        image_attention_mask: mx.array | None = None,
        input_audio_embeds: mx.array | None = None,
        audio_embed_sizes: mx.array | None = None,
        audio_attention_mask: mx.array | None = None,
    ) -> Features:
        """Run the encoders, once, over what the checkpoint's processor makes of media.

        Features of images come before their projection, as those of audio always do.

        Args:
            input_image_embeds: `[images, crops, 3, 448, 448]`; None or empty where there are none.
            image_sizes: `[images, 2]`, height and width of each one's grid of crops in pixels.
            image_attention_mask: `[images, crops, 32, 32]`, 0 at padding; None where none is.
            input_audio_embeds: `[clips, frames, 80]`; None or empty where there are none.
            audio_embed_sizes: `[clips]`, tokens of each.
            audio_attention_mask: `[clips, frames]`, 0 at padding; None where none is.
        """
        extend = self.model.embed_tokens_extend
        images = audio = None
        pixels = given(input_image_embeds)
        if pixels is not None:
            sizes = needed(image_sizes, "image_sizes", "input_image_embeds")
            mask = given(image_attention_mask)
            if mask is None:
                side = self.config.vision.side
                mask = mx.ones((*pixels.shape[:2], side, side))
            places = image_layouts(np.array(mask), np.array(sizes), self.config.vision)
            rows = extend.image_embed.encode(pixels, places)
            images = mx.concatenate(rows)  # [tokens, tower's hidden]
        frames = given(input_audio_embeds)
        if frames is not None:
            sizes = needed(audio_embed_sizes, "audio_embed_sizes", "input_audio_embeds")
            mask = given(audio_attention_mask)
            lengths = audio_layouts(
                frames.shape, np.array(sizes), None if mask is None else np.array(mask)
            )
            clips = extend.audio_embed.encode(frames, lengths)
            audio = mx.concatenate(clips)  # [tokens, attention_dim]
        return Features(images, audio)

    def project_images(self, rows: mx.array) -> mx.array:
        return self.model.embed_tokens_extend.image_embed.project(rows)

    def project_audio(self, rows: mx.array, adapter: str | None) -> mx.array:
        return self.model.embed_tokens_extend.audio_embed.project(rows, adapter)

    @property
    def unused(self) -> tuple[str, ...]:
        tower = "model.embed_tokens_extend.image_embed.img_processor."
        last = f"encoder.layers.{self.config.vision.num_hidden_layers - 1}."
        parts = (last, "post_layernorm.", "head.")
        return (*super().unused, *(f"{tower}{part}*" for part in parts))
