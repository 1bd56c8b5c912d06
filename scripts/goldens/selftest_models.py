"""The tiny models of `phimlx doctor --self-test`, one for each architecture and layout.

    PHIMLX_TEST_DATA=FOLDER python scripts/goldens/selftest_models.py

Each becomes a folder of `phimlx/assets/self-test` whose `reference.safetensors` lists what the
reference computed: transformers for `llama` and `phi4mm` (`model_goldens.py`, `mm_goldens.py`) and
for `phi`, the authors' own code for `phi4flash` and `phi4-siglip`. Nano stands for phi3.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from parity import TEXT, VISION, oracle_arrays, text_cases  # noqa: E402

OUT = ROOT / "phimlx" / "assets" / "self-test"
GOLDENS = {"llama": "models/llama", "phi4mm": "mm-native"}
ORACLES = {"phi": "tiny-phi-qknorm", "phi4flash": "tiny-phi4flash"}
PICTURE = "wide"  # of the fewest patches


def main() -> None:
    tiny = Path(os.environ["PHIMLX_TEST_DATA"]) / "tiny"
    shutil.rmtree(OUT, ignore_errors=True)
    for name, golden in GOLDENS.items():
        shutil.copytree(ROOT / "tests" / "goldens" / golden, OUT / name)
    for name, folder in ORACLES.items():
        arrays = oracle_arrays(tiny / folder)
        write(OUT / name, tiny / folder, text_cases(arrays, TEXT[folder]), arrays)
    folder = tiny / "tiny-phi4-siglip"
    arrays = oracle_arrays(folder)
    kept = {name: array for name, array in arrays.items() if name.startswith(("text.", PICTURE))}
    cases = text_cases(kept, VISION)
    shown = {
        key: f"{PICTURE}.{key}"
        for key in ("pixel_values", "spatial_shapes", "pixel_attention_mask")
        if f"shared.{PICTURE}.{key}" in arrays
    }
    kept |= {stored: arrays[f"shared.{stored}"] for stored in shown.values()}
    for case in cases:
        case["media"] = shown if case["name"] == PICTURE else {}
    write(OUT / "phi4-siglip", folder, cases, kept)


def write(
    out: Path, source: Path, cases: list[dict[str, Any]], arrays: dict[str, mx.array]
) -> None:
    """Write a folder: the model as it is, and the reference's numbers."""
    out.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        if (source / name).exists():
            (out / name).write_bytes((source / name).read_bytes())
    mx.save_safetensors(str(out / "reference.safetensors"), arrays, {"cases": json.dumps(cases)})


if __name__ == "__main__":
    main()
