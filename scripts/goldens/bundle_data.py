"""Packs the part of PHIMLX_TEST_DATA that travels with the tests into tests/assets/data.

    PHIMLX_TEST_DATA=… python scripts/goldens/bundle_data.py

One archive a kind, each sorted and without times or owners, so that the same data give the same
bytes. Checkpoints of one arithmetic lie beside each other, which xz folds into one.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from safetensors.numpy import load_file, save

from tests.bundled import ARCHIVES, LOGITS, ORACLE, VISION, oracle_inputs

CONTENTS = {
    "tokenizers": ["hf", "golden/*.tiktoken"],
    "phi": [
        *(f"tiny/tiny-{name}" for name in ("phi2", "phi2-msft", "phi15", "phi15-mixformer")),
        "tiny/tiny-phi-qknorm",
    ],
    "phi4flash": ["tiny/tiny-phi4flash"],
    "phi4": ["tiny/tiny-phi4", "tiny/tiny-phi4-mini"],
    "multimodal": ["tiny/tiny-phi4mm-remote"],
    "vision": ["tiny/tiny-phi4-siglip"],
    "media": [
        *(f"images/{name}" for name in ("exceltable.png", "test.png", "test.jpg", "cars.jpg")),
        *(f"images/{name}" for name in ("pipeline-cat-chonk.jpeg", "phi4rv_pc_screenshot.png")),
        *(f"audio/1272-141231-0002.{kind}" for kind in ("wav", "mp3")),
        *(f"audio/{name}" for name in ("652-129742-0006.flac", "common_voice_en_59751.mp3")),
        *(f"audio/{name}" for name in ("sr_chinese.flac", "speechbrain/spk2_snt2.wav")),
    ],
    "published": ["golden/*.json", "golden/*.txt", "golden/real-weights", "licences"],
    "text": ["text/mlx-examples-*"],
}


def files(source: Path, patterns: list[str]) -> list[Path]:
    """Every file that the patterns name, folders in full, below `source`."""
    found = [path for pattern in patterns for path in sorted(source.glob(pattern))]
    whole = [[*sorted(path.rglob("*"))] if path.is_dir() else [path] for path in found]
    return [path.relative_to(source) for paths in whole for path in paths if path.is_file()]


def member(source: Path, name: Path) -> tuple[Path, bytes]:
    """A file's name in the archive and its bytes; of oracles what cannot be made again."""
    if name == VISION:
        # Patches are compared by their digest, and features are in the logits.
        left = (".pixel_values", ".features")
        held = load_file(source / name)
        return name, save({k: v for k, v in held.items() if not k.endswith(left)})
    if name != ORACLE:
        return name, (source / name).read_bytes()
    drawn = oracle_inputs()
    return LOGITS, save({k: v for k, v in load_file(source / name).items() if k not in drawn})


def main() -> None:
    source = Path(os.environ["PHIMLX_TEST_DATA"]).resolve()
    ARCHIVES.mkdir(parents=True, exist_ok=True)
    for kind, patterns in CONTENTS.items():
        path = ARCHIVES / f"{kind}.tar.xz"
        with tarfile.open(path, "w:xz", preset=9) as archive:
            for name in files(source, patterns):
                name, content = member(source, name)
                entry = tarfile.TarInfo(str(name))
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
