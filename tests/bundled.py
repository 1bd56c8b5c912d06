"""Real tokenizers and tiny checkpoints that travel with the tests, packed in `assets/data`."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

ARCHIVES = Path(__file__).parent / "assets" / "data"
MULTIMODAL = Path("tiny", "tiny-phi4mm-remote")
LOGITS, ORACLE = MULTIMODAL / "oracle.logits.safetensors", MULTIMODAL / "oracle.safetensors"
VISION = Path("tiny", "tiny-phi4-siglip", "oracle.safetensors")
INPUTS_SHA256 = "5ba5f35f7328291da22f12897046641460a55cc2f6219b24b5d9f67c399bb17d"


def unpack(folder: Path) -> Path:
    """Unpack every archive into `folder`, laid out as PHIMLX_TEST_DATA is."""
    for archive in sorted(ARCHIVES.glob("*.tar.xz")):
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    oracle = {**load_file(folder / LOGITS), **oracle_inputs()}
    (folder / LOGITS).unlink()
    save_file(oracle, folder / ORACLE)
    return folder


def present(path: Path) -> Path:
    """Return a file of the data, or skip the test where only PHIMLX_TEST_DATA could have it."""
    if not path.exists():
        pytest.skip(f"{path.name} does not travel with the tests: set PHIMLX_TEST_DATA")
    return path


def oracle_inputs() -> dict[str, NDArray[np.float32]]:
    """Draw the noise that the original multimodal code was shown, in the order of its drawing."""
    noise = np.random.default_rng(0)
    picture = noise.standard_normal((1, 3, 3, 448, 448)).astype(np.float32) * np.float32(0.5)
    sound, two, long = (
        noise.standard_normal(shape).astype(np.float32)
        for shape in ((1, 301, 80), (2, 301, 80), (1, 4500, 80))
    )
    two[1, 150:] = 0
    inputs = {
        "image.input_image_embeds": picture,
        "both.input_image_embeds": picture,
        "audio.input_audio_embeds": sound,
        "both.input_audio_embeds": sound,
        "two_audio_padded.input_audio_embeds": two,
        "audio45s.input_audio_embeds": long,
    }
    digest = hashlib.sha256(b"".join(array.tobytes() for array in inputs.values())).hexdigest()
    assert digest == INPUTS_SHA256, "NumPy draws other numbers than when the oracle was made"
    return inputs
