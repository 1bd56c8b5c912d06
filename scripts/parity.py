"""Our logits beside the reference's: case, largest |Δ| over the largest |logit|, top-1 agreement.

    python scripts/parity.py

Repeats every golden of the repository on this machine; they were made by transformers with
`scripts/goldens/model_goldens.py` and `mm_goldens.py`. Where PHIMLX_TEST_DATA names a folder with
`tiny/tiny-phi4mm-remote` or `tiny/tiny-phi4-siglip`, what the original code computed there is
repeated too. Exit 1 where a case differs by more than is allowed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from phimlx.evaluation import parity as selftest
from phimlx.generation.placed_media import Media
from phimlx.hub.resolve import NANO
from phimlx.media.naflex import prepare_patches
from phimlx.prompt.media_parts import expand_placeholders
from phimlx.terminal.output import Output

IMAGE = -200  # stands for a picture in reasoning-vision's prompts
GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"
ORACLE = "tiny/tiny-phi4mm-remote"
VISION = "tiny/tiny-phi4-siglip"


def tables() -> Iterator[tuple[str, Iterator[selftest.Result]]]:
    """Each model's name and its cases, run as they are asked for."""
    for folder in [*sorted((GOLDENS / "models").iterdir()), NANO, GOLDENS / "mm-native"]:
        yield folder.name, selftest.run(folder, folder / "reference.safetensors")
    data = os.environ.get("PHIMLX_TEST_DATA")
    if data and (Path(data) / ORACLE).is_dir():
        yield f"{Path(ORACLE).name} (the original code)", oracle(Path(data) / ORACLE)
    if data and (Path(data) / VISION).is_dir():
        yield f"{Path(VISION).name} (the original code)", vision(Path(data) / VISION)


def oracle(folder: Path) -> Iterator[selftest.Result]:
    """The original multimodal code's logits, whose arrays are named `case.input`."""
    arrays = mx.load(str(folder / "oracle.safetensors"))
    assert isinstance(arrays, dict)
    cases: dict[str, dict[str, Any]] = {}
    for name in arrays:
        case, _, key = name.partition(".")
        found = cases.setdefault(
            case,
            {
                "name": case, "run": "media", "dtype": "float32", "bits": None, "allowed": 1e-4,
                "media": {},
            },
        )  # fmt: skip
        if key in ("input_ids", "logits"):
            found[key] = name
        else:
            found["media"][key] = name
    return selftest.repeat(folder, cases.values(), arrays)


def vision(folder: Path) -> Iterator[selftest.Result]:
    """The original reasoning-vision code's logits, of pictures that are prepared here."""
    arrays = mx.load(str(folder / "oracle.safetensors"))
    assert isinstance(arrays, dict)
    cases: list[dict[str, Any]] = []
    for name, pictures in json.loads((folder / "cases.json").read_text()).items():
        made = prepare_patches(
            [folder / "pictures" / f"{one}.png" for one in pictures or ["small"]]
        )
        given = {key: mx.array(value) for key, value in made.arrays().items()} if pictures else {}
        arrays |= {f"{name}.{key}": value for key, value in given.items()}
        case = {"name": name, "dtype": "float32", "bits": None, "allowed": 3e-5}
        if f"{name}.generated" in arrays:
            placeholders = {"image": IMAGE}
            prompt, _ = expand_placeholders(
                arrays[f"{name}.input_ids"][0].tolist(), placeholders, {"image": made.tokens}
            )
            items = tuple(zip(made.digests, made.tokens, strict=True))
            arrays[f"{name}.prompt"] = mx.array(prompt)
            case |= {
                "run": "generate", "prompt": f"{name}.prompt", "tokens": f"{name}.generated",
                "allowed": 0, "prepared": Media(given, items),
            }  # fmt: skip
        else:
            mask = f"{name}.attention_mask"
            case |= {
                "run": "media", "input_ids": f"{name}.input_ids", "logits": f"{name}.logits",
                "positions": f"{name}.rows", "mask": mask if mask in arrays else None,
                "media": {key: f"{name}.{key}" for key in given},
            }  # fmt: skip
        cases.append(case)
    yield from selftest.repeat(folder, cases, arrays)


def main() -> int:
    output, failed = Output(), 0
    for name, results in tables():
        rows = []
        for result in results:
            failed += not result.passed
            rows.append(
                (
                    result.case,
                    f"{result.difference:.1e}",
                    f"{result.allowed:.1e}",
                    f"{result.top1:.0%}",
                    "" if result.passed else "FAILED",
                )
            )
        output.text(f"\n{name}", "bold")
        output.table(["case", "max |Δ| / max |logit|", "allowed", "top-1", ""], rows)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
