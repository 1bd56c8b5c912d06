"""Writes tests/goldens/audio/log_mel.npz: what two published extractors make of the same sounds.

    python scripts/goldens/audio_goldens.py PUBLISHED SOUNDS

PUBLISHED is a folder with `processing_phi4mm.py` of microsoft/Phi-4-multimodal-instruct; SOUNDS a
folder of recordings. Needs transformers, torch and scipy; knows nothing of phimlx. Of each sound
every `STRIDE`-th frame is kept, and the last.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from transformers import Phi4MultimodalFeatureExtractor

STRIDE = 97
OUTPUT = Path(__file__).parents[2] / "tests" / "goldens" / "audio" / "log_mel.npz"
SOUNDS = {".wav", ".flac", ".mp3", ".ogg"}
# Names of the sounds that are padded together.
BATCH = ("made/noise", "made/sweep", "made/noise-8k")


def made() -> dict[str, tuple[np.ndarray, int]]:
    """Sounds that a formula gives, so that the goldens also serve without the recordings."""
    noise = np.random.default_rng(1).standard_normal(48000).astype(np.float32)
    time = np.arange(40000) / 16000
    sweep = np.sin(2 * np.pi * (50 * time + 1550 * time**2)).astype(np.float32)
    return {
        "made/noise": (0.1 * noise, 16000),
        "made/sweep": (0.9 * sweep, 16000),
        "made/quiet": (1e-4 * noise[:8000], 16000),
        "made/silence": (np.zeros(4000, np.float32), 16000),
        "made/one-frame": (0.1 * noise[:400], 16000),
        "made/noise-8k": (0.1 * noise[:20000], 8000),
    }


def recorded(folder: Path) -> dict[str, tuple[np.ndarray, int]]:
    """Every recording, mixed to one channel; all but 8 kHz resampled to 16 kHz."""
    sounds = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SOUNDS):
        samples, rate = soundfile.read(path, dtype="float64", always_2d=True)
        mono = samples.mean(1).astype(np.float32)
        if rate not in (8000, 16000):
            mono, rate = soxr.resample(mono, rate, 16000, quality="HQ"), 16000
        sounds[path.relative_to(folder).as_posix()] = mono, rate
    return sounds


def published(folder: Path) -> Any:
    """The extractor that the checkpoint's own code defines."""
    spec = importlib.util.spec_from_file_location("published", folder / "processing_phi4mm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Phi4MMAudioFeatureExtractor(8, 1, 1)


def main() -> None:
    torch.set_num_threads(1)
    extractor, ported = published(Path(sys.argv[1])), Phi4MultimodalFeatureExtractor()
    sounds = made() | recorded(Path(sys.argv[2]))
    goldens = {}
    for name, (samples, rate) in sounds.items():
        result = extractor([(samples, rate)])
        features = result["input_audio_embeds"][0].numpy()
        kept = np.append(np.arange(0, len(features), STRIDE), len(features) - 1)
        goldens[f"{name}/frames"] = np.array([len(features), int(result["audio_embed_sizes"][0])])
        goldens[f"{name}/published"] = features[kept]
        if rate == 16000:
            ports = ported([samples], sampling_rate=rate, return_tensors="np")
            goldens[f"{name}/transformers"] = ports["audio_input_features"][0][kept]
    batch = extractor([sounds[name] for name in BATCH])
    goldens["batch/embeds"] = batch["input_audio_embeds"][:, ::STRIDE].numpy()
    goldens["batch/mask"] = batch["audio_attention_mask"].numpy()
    goldens["batch/sizes"] = batch["audio_embed_sizes"].numpy()
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUTPUT, **goldens)


if __name__ == "__main__":
    main()
