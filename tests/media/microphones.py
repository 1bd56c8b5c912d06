"""Recordings for the fake microphone of `tests/fake_device`, and putting it in place."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
from numpy.typing import NDArray

FAKE_DEVICE = Path(__file__).parents[1] / "fake_device"


def recording(
    *lengths: float, rate: int = 16_000, loud: float = 0.1, hum: float = 1e-4
) -> NDArray[np.float32]:
    """Noise as loud as speech and a hum by turns, of so many seconds each; the hum comes first."""
    random = np.random.default_rng(1)
    parts = [
        (loud if index % 2 else hum) * random.standard_normal(round(length * rate))
        for index, length in enumerate(lengths)
    ]
    return np.concatenate(parts).astype(np.float32)


def plug_in(
    patch: pytest.MonkeyPatch, folder: Path, samples: NDArray[np.float32], rate: int, **device: str
) -> None:
    """Make the fake microphone play samples; `then`, `error` and `overflow` as it knows them."""
    for name, value in device_environment(folder, samples, rate, **device).items():
        patch.setenv(name, value)
    patch.syspath_prepend(str(FAKE_DEVICE))
    patch.delitem(sys.modules, "sounddevice", raising=False)


def device_environment(
    folder: Path, samples: NDArray[np.float32], rate: int, **device: str
) -> dict[str, str]:
    """The variables that tell the fake microphone what to play."""
    path = folder / "microphone.wav"
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return {
        "FAKE_MICROPHONE": str(path),
        **{f"FAKE_{name.upper()}": value for name, value in device.items()},
    }
