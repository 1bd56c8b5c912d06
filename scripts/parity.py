"""Our logits beside the reference's: case, largest |Δ| over the largest |logit|, top-1 agreement.

    python scripts/parity.py

Repeats every golden of the repository on this machine; the goldens were made by transformers with
`scripts/goldens/model_goldens.py`. Exit 1 where a case differs by more than is allowed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from phimlx import selftest
from phimlx.hub import NANO
from phimlx.terminal.output import Output

MODELS = Path(__file__).parents[1] / "tests" / "goldens" / "models"


def main() -> int:
    output, failed = Output(), 0
    for folder in [*sorted(MODELS.iterdir()), NANO]:
        rows = []
        for result in selftest.run(folder, folder / "reference.safetensors"):
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
        output.text(f"\n{folder.name}", "bold")
        output.table(["case", "max |Δ| / max |logit|", "allowed", "top-1", ""], rows)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
