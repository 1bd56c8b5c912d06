"""Our logits beside the reference's: case, largest |Δ| over the largest |logit|, top-1 agreement.

    python scripts/parity.py

Repeats every golden of the repository on this machine, made by transformers with
`scripts/goldens/model_goldens.py` and `mm_goldens.py`, and what the original code of each
architecture computed on a tiny checkpoint: those that travel with the tests, or in the folder that
PHIMLX_TEST_DATA names. Exit 1 where a case differs by more than is allowed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
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

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.bundled import unpack

IMAGE = -200  # stands for a picture in reasoning-vision's prompts
GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"
# Largest difference that a right port shows: wrong forms of GELU show as little as 7e-5.
TEXT = {
    "tiny-phi2": 2e-5,
    "tiny-phi15": 2e-5,
    "tiny-phi-qknorm": 2e-5,
    "tiny-phi2-msft": 2e-5,
    "tiny-phi15-mixformer": 2e-5,
    "tiny-phi4flash": 5e-5,
}
VISION = 3e-5


def tables(data: Path) -> Iterator[tuple[str, Iterator[selftest.Result]]]:
    """Each model's name and its cases, run as they are asked for.

    Args:
        data: the folder whose `tiny` holds what the original code computed.
    """
    for folder in [*sorted((GOLDENS / "models").iterdir()), NANO, GOLDENS / "mm-native"]:
        yield folder.name, selftest.run(folder, folder / "reference.safetensors")
    tiny = data / "tiny"
    for name, allowed in TEXT.items():
        arrays = oracle_arrays(tiny / name)
        cases = text_cases(arrays, allowed)
        yield f"{name} (the original code)", selftest.repeat(tiny / name, cases, arrays)
    yield "tiny-phi4mm-remote (the original code)", oracle(tiny / "tiny-phi4mm-remote")
    yield "tiny-phi4-siglip (the original code)", vision(tiny / "tiny-phi4-siglip")


def oracle_arrays(folder: Path) -> dict[str, mx.array]:
    """Read what the original code computed with a folder's model."""
    arrays = mx.load(str(folder / "oracle.safetensors"))
    assert isinstance(arrays, dict)
    return arrays


def text_cases(arrays: dict[str, mx.array], allowed: float) -> list[dict[str, Any]]:
    """List the cases of a text model's oracle; its arrays are named `case.input`."""
    cases: list[dict[str, Any]] = []
    for name in sorted({name.partition(".")[0] for name in arrays}):
        said = re.sub(r"^len(\d+)$", r"\1 tokens", name)
        case: dict[str, Any] = {"name": said, "dtype": "float32", "bits": None, "allowed": allowed}
        if f"{name}.generated" in arrays:
            arrays[f"{name}.prompt"] = arrays[f"{name}.input_ids"][0]
            case |= {
                "run": "generate", "prompt": f"{name}.prompt", "tokens": f"{name}.generated",
                "allowed": 0,
            }  # fmt: skip
        else:
            mask = f"{name}.attention_mask"
            case |= {
                "run": "media", "input_ids": f"{name}.input_ids", "logits": f"{name}.logits",
                "positions": f"{name}.rows", "mask": mask if mask in arrays else None, "media": {},
            }  # fmt: skip
        cases.append(case)
    return cases


def oracle(folder: Path) -> Iterator[selftest.Result]:
    """The original multimodal code's logits, whose arrays are named `case.input`."""
    arrays = oracle_arrays(folder)
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
    arrays = oracle_arrays(folder)
    cases: list[dict[str, Any]] = []
    for name, pictures in json.loads((folder / "cases.json").read_text()).items():
        made = prepare_patches(
            [folder / "pictures" / f"{one}.png" for one in pictures or ["small"]]
        )
        given = {key: mx.array(value) for key, value in made.arrays().items()} if pictures else {}
        arrays |= {f"{name}.{key}": value for key, value in given.items()}
        case = {"name": name, "dtype": "float32", "bits": None, "allowed": VISION}
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
    data = os.environ.get("PHIMLX_TEST_DATA")
    if data:
        return report(Path(data))
    with tempfile.TemporaryDirectory() as folder:
        return report(unpack(Path(folder)))


def report(data: Path) -> int:
    """Print the table of every model."""
    output, failed = Output(), 0
    for name, results in tables(data):
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
