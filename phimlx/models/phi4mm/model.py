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

from phimlx.errors import ConfigError, PromptError, shortened
from phimlx.models.base import CausalLM, ForwardPass
from phimlx.models.cache.kv import Cache, with_past
from phimlx.models.cache.media import MediaCache
from phimlx.models.cache.quantized import make_store
from phimlx.models.cache.store import Store
from phimlx.models.features import ADAPTERS, Features, Placeholders
from phimlx.models.lora import MAX_RANK, LoRALinear
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
        return Placeholders(self.image_token_id, self.audio_token_id)


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
    placeholders = Placeholders(*tokens)
    if placeholders.image == placeholders.audio:
        raise ConfigError(f"config.json: image_token_id and audio_token_id are both {value}.")
    return placeholders


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


class Phi4MMForCausalLM(CausalLM):
    """A multimodal model. Parameters carry the names and shapes of the published checkpoint.

    Each row's adapter follows from the whole of that row, cached part included: `vision` where it
    holds a picture, else `speech` where it holds sound, else none. Nothing of a call is left
    behind but what its cache holds.
    """

    model_type = "phi4mm"
    config: Phi4MMConfig
    placeholders: Placeholders

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

    def encode_media(  # type: ignore[override]  # the processor's own names
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
        pixels = _given(input_image_embeds)
        if pixels is not None:
            sizes = _needed(image_sizes, "image_sizes", "input_image_embeds")
            mask = _given(image_attention_mask)
            if mask is None:
                side = self.config.vision.side
                mask = mx.ones((*pixels.shape[:2], side, side))
            places = image_layouts(np.array(mask), np.array(sizes), self.config.vision)
            images = mx.concatenate(extend.image_embed(pixels, places))  # [tokens, hidden]
        frames = _given(input_audio_embeds)
        if frames is not None:
            sizes = _needed(audio_embed_sizes, "audio_embed_sizes", "input_audio_embeds")
            mask = _given(audio_attention_mask)
            lengths = audio_layouts(
                frames.shape, np.array(sizes), None if mask is None else np.array(mask)
            )
            clips = extend.audio_embed.encode(frames, lengths)
            audio = mx.concatenate(clips)  # [tokens, attention_dim]
        return Features(images, audio)

    def _begin(
        self,
        input_ids: mx.array,
        cache: Cache | None,
        attention_mask: mx.array | None,
        features: Features | None,
    ) -> tuple[mx.array, ForwardPass]:
        batch, length = input_ids.shape
        # Without a cache, one without layers still says where the tokens stand.
        kept = self._media_cache(cache) or self._make_cache(Store(0))
        rows = self.placeholders.by_row(input_ids, features)
        held = kept.features_with(rows)
        adapters = kept.adapters_of(held)
        past = kept.tokens_to_recompute((batch, length), attention_mask, adapters)
        if past is not None:
            input_ids, attention_mask = with_past(past, input_ids, attention_mask)
            rows = held
        positions, long, mask, routing = kept.extend(input_ids, attention_mask, adapters, held)
        rope = self.config.rope(positions, long)
        forward = ForwardPass(positions, mask, rope, cache, routing)
        return self._embed(input_ids, rows, adapters), forward

    def make_cache(
        self,
        expected_length: int = 0,
        expected_adapters: tuple[str | None, ...] = (),
        kv_bits: int | None = None,
    ) -> MediaCache:
        """Make an empty cache; arguments and errors as for every model."""
        config = self.config
        store = make_store(config.num_hidden_layers, config.head_dim, kv_bits)
        return self._make_cache(store, expected_length, expected_adapters)

    def _make_cache(
        self,
        store: Store,
        expected_length: int = 0,
        expected_adapters: tuple[str | None, ...] = (),
    ) -> MediaCache:
        return MediaCache(
            store,
            self.config.rope,
            self.placeholders,
            expected_length,
            expected_adapters,
            self.config.sliding_window,
            self.default_adapter,
        )

    @property
    def unused(self) -> tuple[str, ...]:
        tower = "model.embed_tokens_extend.image_embed.img_processor."
        last = f"encoder.layers.{self.config.vision.num_hidden_layers - 1}."
        parts = (last, "post_layernorm.", "head.")
        return (*super().unused, *(f"{tower}{part}*" for part in parts))

    @staticmethod
    def _media_cache(cache: Cache | None) -> MediaCache | None:
        if cache is not None and not isinstance(cache, MediaCache):
            raise TypeError("a multimodal model's cache comes from its own make_cache")
        return cache

    def _embed(
        self, input_ids: mx.array, rows: tuple[Features, ...], adapters: tuple[str | None, ...]
    ) -> mx.array:
        """Embeddings `[batch, length, hidden]`, with each row's features at its placeholders."""
        x = self.model.embed_tokens(input_ids)
        if not any(any(row.counts) for row in rows):
            return x
        project = self.model.embed_tokens_extend.audio_embed.project
        values = (
            [row.images for row in rows if row.images is not None],
            [
                project(row.audio, adapter)
                for row, adapter in zip(rows, adapters, strict=True)
                if row.audio is not None
            ],
        )
        flat = x.reshape(-1, x.shape[-1])
        places = self.placeholders.places(np.array(input_ids))
        for indices, given in zip(places, values, strict=True):
            if given:
                flat[mx.array(indices)] = mx.concatenate(given).astype(x.dtype)
        return flat.reshape(x.shape)


def _given(array: Any) -> mx.array | None:
    """An array; None for one without numbers, as the reference's processor makes for no media."""
    return None if array is None or array.size == 0 else mx.array(array)


def _needed(array: Any, name: str, beside: str) -> mx.array:
    given = _given(array)
    if given is None:
        raise PromptError(f"{beside} comes without {name}.")
    return given
