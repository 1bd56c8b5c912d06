"""Audio to the arrays that the audio encoder takes, several padded together as in the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phimlx.errors import MediaError
from phimlx.media.audio_file import AudioSource, open_audio
from phimlx.media.limits import Limits
from phimlx.media.log_mel import MEL_BINS, AudioClip, log_mel, token_count

__all__ = ["Audio", "AudioClip", "AudioSource", "load_audio", "log_mel", "prepare_audio"]


@dataclass(frozen=True)
class Audio:
    """Audio inputs of the model: one or more sounds, padded together.

    Attributes:
        input_audio_embeds: log-mel features, float32 `[sounds, frames, 80]`, zero behind each.
        audio_embed_sizes: slots of each sound in the prompt, int64 `[sounds]`.
        audio_attention_mask: which frames are a sound's own, bool `[sounds, frames]`; None for
            one sound alone, as in the original.
        seconds: length of each sound.
        digests: sha256 of each sound's samples and rate.
    """

    input_audio_embeds: NDArray[np.float32]
    audio_embed_sizes: NDArray[np.int64]
    audio_attention_mask: NDArray[np.bool_] | None
    seconds: list[float]
    digests: list[bytes]

    @property
    def tokens(self) -> list[int]:
        return [int(size) for size in self.audio_embed_sizes]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays under the processor's names; without the mask where there is none."""
        arrays: dict[str, NDArray[Any]] = {
            "input_audio_embeds": self.input_audio_embeds,
            "audio_embed_sizes": self.audio_embed_sizes,
        }
        if self.audio_attention_mask is not None:
            arrays["audio_attention_mask"] = self.audio_attention_mask
        return arrays


def load_audio(source: AudioSource, limits: Limits | None = None) -> AudioClip:
    """Read one sound as the model hears it: mono, at 16 kHz, or at 8 kHz where it was recorded so.

    Args:
        source: path, https URL, bytes, file object, or (samples, rate) with samples `[samples]`
            or `[samples, channels]`: floats from -1 to 1, or integers of their full scale.
        limits: what it may be; `max_seconds` and `max_bytes` are looked at.

    Raises:
        MediaError: it cannot be had, is no sound, is damaged, or larger than the limits allow.
    """
    with open_audio(source, limits) as sound:
        return AudioClip(np.concatenate(list(sound.blocks)), sound.rate)


def prepare_audio(sources: Sequence[AudioSource], limits: Limits | None = None) -> Audio:
    """Turn sounds into features, padded to the longest; MediaError as `load_audio` and `log_mel`.

    Source: `Phi4MMAudioFeatureExtractor.__call__` of the published `processing_phi4mm.py`.
    """
    if not sources:
        raise MediaError("No sound was given.", hint="Give at least one.")
    clips = [load_audio(source, limits) for source in sources]
    features = [log_mel(clip) for clip in clips]
    lengths = np.array([len(rows) for rows in features])
    longest = int(lengths.max())
    embeds = np.zeros((len(features), longest, MEL_BINS), np.float32)
    for row, rows in zip(embeds, features, strict=True):
        row[: len(rows)] = rows
    mask = np.arange(longest)[None, :] < lengths[:, None] if len(features) > 1 else None
    return Audio(
        input_audio_embeds=embeds,
        audio_embed_sizes=np.array([token_count(len(rows)) for rows in features], np.int64),
        audio_attention_mask=mask,
        seconds=[clip.seconds for clip in clips],
        digests=[clip.digest for clip in clips],
    )
