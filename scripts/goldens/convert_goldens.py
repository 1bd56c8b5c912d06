"""What mlx-lm's converter makes of the tiny models in tests/goldens/models, tensor by tensor.

    python scripts/goldens/convert_goldens.py tests/goldens/models tests/goldens/convert.json

Needs mlx-lm, which the tests do without.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import load_model, quantize_model

# model, bits or None, group size, dtype or None
CASES: list[tuple[str, int | None, int, str | None]] = [
    ("phi-4", None, 64, None),
    ("phi-4", None, 64, "bfloat16"),
    *(("phi-4", bits, 32, "bfloat16") for bits in (2, 3, 4, 5, 6, 8)),
    ("phi-4", 4, 64, "float16"),
    ("phi-4", 4, 128, "float32"),  # leaves down_proj as it is: it is 64 wide
    ("mini-step-32", 4, 64, None),
    ("mini-step-32", 8, 128, "bfloat16"),
]


def convert(folder: Path, bits: int | None, group_size: int, dtype: str | None) -> dict[str, Any]:
    """The tensors of `mlx_lm.convert`: cast, then quantize."""
    model, config = load_model(folder, lazy=True)
    if dtype is not None:
        model.update(tree_map(lambda array: array.astype(getattr(mx, dtype)), model.parameters()))
    if bits is not None:
        model, config = quantize_model(model, config, group_size, bits)
    return dict(tree_flatten(model.parameters()))


def fingerprint(array: mx.array) -> str:
    """Type, shape and the first half of the SHA-256 of the bytes."""
    words = {2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    digest = hashlib.sha256(memoryview(mx.contiguous(array).view(words))).hexdigest()
    return f"{str(array.dtype).rpartition('.')[2]} {list(array.shape)} {digest[:32]}"


if __name__ == "__main__":
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    mx.set_default_device(mx.cpu)
    cases = []
    for model, bits, group_size, dtype in CASES:
        tensors = convert(models / model, bits, group_size, dtype)
        cases.append(
            {
                "model": model,
                "bits": bits,
                "group_size": group_size,
                "dtype": dtype,
                "tensors": {name: fingerprint(tensors[name]) for name in sorted(tensors)},
            }
        )
    # The same operations round differently on another kind of processor.
    goldens = {"machine": platform.machine(), "cases": cases}
    out.write_text(json.dumps(goldens, indent=1) + "\n")
