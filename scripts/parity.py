"""Our logits beside the reference's: case, largest |Δ| over the largest |logit|, top-1 agreement.

    python scripts/parity.py

Repeats every golden of the repository on this machine; they were made by transformers with
`scripts/goldens/model_goldens.py` and `mm_goldens.py`. Where PHIMLX_TEST_DATA names a folder with
`tiny/tiny-phi4mm-remote`, what the original multimodal code computed there is repeated too. Exit 1
where a case differs by more than is allowed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from phimlx.evaluation import parity as selftest
from phimlx.hub.resolve import NANO
from phimlx.terminal.output import Output

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"
ORACLE = "tiny/tiny-phi4mm-remote"


def tables() -> Iterator[tuple[str, Iterator[selftest.Result]]]:
    """Each model's name and its cases, run as they are asked for."""
    for folder in [*sorted((GOLDENS / "models").iterdir()), NANO, GOLDENS / "mm-native"]:
        yield folder.name, selftest.run(folder, folder / "reference.safetensors")
    data = os.environ.get("PHIMLX_TEST_DATA")
    if data and (Path(data) / ORACLE).is_dir():
        yield f"{Path(ORACLE).name} (the original code)", oracle(Path(data) / ORACLE)


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
