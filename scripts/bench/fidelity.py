"""How often the likeliest next token is the reference's, phimlx beside mlx-lm.

    python scripts/bench/fidelity.py

On the goldens that transformers made (`tests/goldens/models`): random models with Phi-4-mini's real
rotary factors, one pass over each length, float32. Needs mlx-lm.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model as load_theirs
from safetensors import safe_open

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.terminal.output import Output

MODELS = Path(__file__).parents[2] / "tests" / "goldens" / "models"


def agreement(model: nn.Module, ids: mx.array, positions: mx.array, expected: mx.array) -> str:
    """Top-1 agreement, and the largest difference over the largest reference logit."""
    logits = model(ids[None].astype(mx.int32))[0, positions].astype(mx.float32)
    same = (logits.argmax(axis=-1) == expected.argmax(axis=-1)).astype(mx.float32).mean()
    difference = mx.abs(logits - expected).max() / mx.abs(expected).max()
    return f"{same.item():.0%}, {difference.item():.0e}"


def main() -> None:
    output = Output()
    rows = []
    for folder in sorted(MODELS.iterdir()):
        file = folder / "reference.safetensors"
        with safe_open(str(file), framework="mlx") as opened:
            cases = json.loads(opened.metadata()["cases"])
        arrays = mx.load(str(file))
        ours = load_model(Checkpoint(folder), mx.float32)
        theirs, _ = load_theirs(folder)
        theirs.set_dtype(mx.float32)
        for case in cases:
            if case["run"] != "pass" or case["dtype"] != "float32" or case["bits"]:
                continue
            if case.get("chunk"):
                continue
            inputs = [arrays[case[key]] for key in ("input_ids", "positions", "logits")]
            found = (agreement(ours, *inputs), agreement(theirs, *inputs))
            rows.append((folder.name, case["name"], *found))
    output.table(["model", "case", "phimlx: top-1, max |Δ|", "mlx-lm: top-1, max |Δ|"], rows)


if __name__ == "__main__":
    main()
