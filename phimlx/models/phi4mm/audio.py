"""Phi-4-multimodal's audio encoder: the conformer over log-mel frames, and its projections.

How long clips are is worked out in numpy, by `audio_layouts`; what is computed of frames waits for
no value, and so can be differentiated and compiled.
Source: the checkpoint's own `speech_conformer_encoder.py`; transformers
`models/phi4_multimodal/modeling_phi4_multimodal.py`, whose mask of padded clips is not followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from phimlx.errors import MediaError
from phimlx.machine.order import after
from phimlx.models.phi4mm.config import AudioConfig as AudioConfig
from phimlx.models.phi4mm.conformer import Encoder, audio_tokens
from phimlx.models.siglip import gelu


@dataclass(frozen=True)
class AudioLayout:
    """The length of a clip.

    Attributes:
        tokens: of the clip's frames.
        placeholders: of the prompt that it fills, at most as many.
        pad: as in `Encoder`.
    """

    tokens: int
    placeholders: int
    pad: bool


def audio_layouts(
    shape: Sequence[int],
    audio_embed_sizes: NDArray[np.integer],
    audio_attention_mask: NDArray[Any] | None,
) -> list[AudioLayout]:
    """Find out how long each clip is.

    Args:
        shape: of the log-mel frames, `[clips, frames, bins]`.
        audio_embed_sizes: `[clips]`, tokens of each.
        audio_attention_mask: `[clips, frames]`, 0 at padding; None where there is none.

    Raises:
        MediaError: for a clip with fewer frames than its tokens need.
    """
    frames = np.full(shape[0], shape[1])
    if audio_attention_mask is not None:
        frames = (audio_attention_mask != 0).sum(axis=1)
    layouts = []
    for i, (count, wanted) in enumerate(zip(frames, audio_embed_sizes, strict=True), 1):
        tokens = audio_tokens(int(count))
        if not 0 < wanted <= tokens:
            raise MediaError(
                f"Audio clip {i} has {tokens} tokens in {count} frames, but audio_embed_sizes has "
                f"{wanted}.",
                hint="The arrays must come from one call of the processor.",
            )
        layouts.append(AudioLayout(tokens, int(wanted), pad=audio_attention_mask is None))
    return layouts


class AudioEmbedding(nn.Module):
    """Clips to features of the language model."""

    def __init__(self, config: AudioConfig, hidden_size: int) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.audio_projection = {
            mode: [
                nn.Linear(config.attention_dim, hidden_size),
                nn.Identity(),  # the activation's place
                nn.Linear(hidden_size, hidden_size),
            ]
            for mode in ("speech", "vision")
        }

    def encode(
        self, input_audio_embeds: mx.array, layouts: Sequence[AudioLayout]
    ) -> list[mx.array]:
        """Features of each clip, before a projection.

        Args:
            input_audio_embeds: `[clips, frames, bins]`, log-mel, zeros after a clip's end.
            layouts: from `audio_layouts`.

        Returns:
            For each clip `[placeholders, attention_dim]`.
        """
        features: list[mx.array] = []
        for clip, layout in zip(input_audio_embeds, layouts, strict=True):
            frames = after(clip[: 8 * layout.tokens], *features[-1:])
            encoded = self.encoder(frames, layout.tokens, layout.pad)
            features.append(encoded[: layout.placeholders])
        return features

    def project(self, features: mx.array, mode: Literal["speech", "vision"]) -> mx.array:
        """Project `[tokens, attention_dim]` to `[tokens, hidden]`.

        Args:
            mode: `vision` where the same prompt holds an image, `speech` where none.
        """
        up, _, down = self.audio_projection[mode]
        return down(gelu(up(features)))
