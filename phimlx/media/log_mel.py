"""Log-mel features of a sound, as Phi-4-multimodal's own extractor computes them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from phimlx.errors import MediaError

Samples = NDArray[np.float32]

MEL_BINS = 80
FRAMES_PER_TOKEN = 8
# Frames transformed at a time: what the processor's cache holds, whatever the length of the sound.
BLOCK = 512

_FULL_SCALE = np.float32(32768)
_PREEMPHASIS = np.float32(0.97)
_MEL_RATE = 16000
_MEL_FFT = 512
_MEL_TOP = 7690  # Hz


@dataclass(frozen=True)
class Framing:
    """The cut of one sampling rate into frames: 25 ms every 10 ms; lengths in samples."""

    window: int
    hop: int
    fft: int


FRAMINGS = {16000: Framing(400, 160, 512), 8000: Framing(200, 80, 256)}


@dataclass(frozen=True)
class AudioClip:
    """A sound as the model takes it: mono samples `[samples]` from -1 to 1, at 8 or 16 kHz."""

    samples: Samples
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate

    @property
    def digest(self) -> bytes:
        """sha256 over the rate and the samples: equal only for the same sound."""
        return sha256(self.rate.to_bytes(4, "little") + self.samples.tobytes()).digest()


def frame_count(samples: int, rate: int) -> int:
    """Count the whole 25 ms windows in that many samples; what is left at the end is not heard."""
    framing = FRAMINGS[rate]
    return max((samples - framing.window) // framing.hop + 1, 0)


def token_count(frames: int) -> int:
    """Count the placeholders that so many frames take in the prompt: one for 80 ms."""
    return -(-frames // FRAMES_PER_TOKEN)


def log_mel(clip: AudioClip) -> NDArray[np.float32]:
    """Compute the features that the audio encoder reads, float32 `[frames, 80]`.

    MediaError where the clip is shorter than one window of 25 ms: the original has no features
    for it either.

    An 8 kHz clip has nothing above 4 kHz: that half of its spectrum is zero, as in the original,
    which is not the same as resampling it.

    Source: `Phi4MMAudioFeatureExtractor._extract_features` of the published
    `processing_phi4mm.py`. (transformers' extractor lets one bin more into the last of the 80.)
    """
    framing = FRAMINGS[clip.rate]
    frames = frame_count(len(clip.samples), clip.rate)
    if frames == 0:
        raise MediaError(
            f"A sound of {1000 * clip.seconds:.1f} ms is too short to be heard.",
            hint="Phi-4 hears in windows of 25 ms: give it at least one.",
        )
    windows = sliding_window_view(clip.samples, framing.window)[:: framing.hop]  # [frames, window]
    hamming = np.hamming(framing.window)
    # The highest bin of 8 kHz, half its rate, counts as empty too; at 16 kHz no mel bin reaches it.
    mel = mel_filters()[: framing.fft // 2]  # [bins, 80]
    features = np.empty((frames, MEL_BINS), np.float32)
    for start in range(0, frames, BLOCK):
        block = windows[start : start + BLOCK]
        emphasised = np.empty(block.shape, np.float32)
        np.multiply(block[:, :-1], _PREEMPHASIS, out=emphasised[:, 1:])
        np.multiply(block[:, 0], _PREEMPHASIS, out=emphasised[:, 0])
        np.subtract(block, emphasised, out=emphasised)
        emphasised *= _FULL_SCALE
        # In double precision: a quiet bin beside a loud one is lost in single precision.
        spectrum = np.fft.rfft(emphasised * hamming, n=framing.fft, axis=1)[:, : framing.fft // 2]
        power = spectrum.real**2 + spectrum.imag**2  # [frames, bins]
        mels = power.astype(np.float32) @ mel  # [frames, 80]
        features[start : start + BLOCK] = np.log(np.maximum(mels, 1))
    return features


@cache
def mel_filters() -> NDArray[np.float32]:
    """Build triangles in mel space over the bins of 16 kHz, float32 `[257, 80]`.

    The lowest bin and those from the top frequency on belong to none.
    """
    frequencies = np.arange(_MEL_FFT // 2 + 1) * (_MEL_RATE / _MEL_FFT)
    edges = np.linspace(0, _mel(np.array(float(_MEL_TOP))), MEL_BINS + 2)
    width = edges[1]
    distance = np.abs(_mel(frequencies)[:, None] - edges[None, 1:-1])
    filters = np.maximum(1 - distance / width, 0)  # [257, 80]
    filters[0] = 0
    filters[int(_MEL_TOP * _MEL_FFT / _MEL_RATE + 0.5) :] = 0
    return filters.astype(np.float32)


def _mel(hertz: NDArray[Any]) -> NDArray[Any]:
    return 1127 * np.log(1 + hertz / 700)
