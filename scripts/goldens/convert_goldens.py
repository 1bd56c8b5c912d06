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
from mlx_lm.utils import dequantize_model, load_model, quantize_model

PLAIN = {"bits": None, "group_size": 64, "mode": "affine", "dtype": None, "recipe": None}
FOUR = {"bits": 4, "group_size": 64, "mode": "affine", "dtype": "bfloat16"}

# What is asked for, and whether the result is dequantized again.
CASES: list[dict[str, Any]] = [
    {"model": "phi-4"},
    {"model": "phi-4", "dtype": "bfloat16"},
    *(
        {"model": "phi-4", "bits": bits, "group_size": 32, "dtype": "bfloat16"}
        for bits in (2, 3, 4, 5, 6, 8)
    ),
    {"model": "phi-4", "bits": 4, "dtype": "float16"},
    # Leaves down_proj as it is: it is 64 wide.
    {"model": "phi-4", "bits": 4, "group_size": 128, "dtype": "float32"},
    {"model": "mini-step-32", "bits": 4},
    {"model": "mini-step-32", "bits": 8, "group_size": 128, "dtype": "bfloat16"},
    {**FOUR, "model": "phi-4", "group_size": 32, "mode": "mxfp4"},
    {**FOUR, "model": "phi-4", "group_size": 32, "mode": "mxfp8", "bits": 8},
    {**FOUR, "model": "phi-4", "group_size": 16, "mode": "nvfp4"},
    {**FOUR, "model": "phi-4", "recipe": "mixed-4-5"},
    {**FOUR, "model": "mini-step-32", "bits": 6, "recipe": "mixed-6-8"},
    {**FOUR, "model": "phi-4", "dequantize": True},
    {**FOUR, "model": "phi-4", "group_size": 32, "mode": "mxfp4", "dequantize": True},
    {**FOUR, "model": "mini-step-32", "group_size": 16, "mode": "nvfp4", "dequantize": True},
]


def convert(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """The tensors of `mlx_lm.convert`: cast, quantize, dequantize."""
    model, config = load_model(folder, lazy=True)
    if case["dtype"] is not None:
        dtype = getattr(mx, case["dtype"])
        model.update(tree_map(lambda array: array.astype(dtype), model.parameters()))
    form = {key: case[key] for key in ("group_size", "bits", "mode")}
    recipe = case["recipe"]

    def predicate(path: str, _: Any) -> dict[str, Any]:
        """A model of two blocks has nothing but ends."""
        outside = ("embed_tokens", "lm_head", "qkv_proj", "o_proj", "down_proj")
        more = path.endswith(outside) or ".layers.0." in path
        return {**form, "bits": int(recipe[-1])} if more else form

    if case["bits"] is not None:
        model, config = quantize_model(
            model, config, **form, quant_predicate=predicate if recipe else None
        )
    if case.get("dequantize"):
        model = dequantize_model(model)
    return dict(tree_flatten(model.parameters()))


def fingerprint(array: mx.array) -> str:
    """Type, shape and the first half of the SHA-256 of the bytes."""
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    digest = hashlib.sha256(memoryview(mx.contiguous(array).view(words))).hexdigest()
    return f"{str(array.dtype).rpartition('.')[2]} {list(array.shape)} {digest[:32]}"


if __name__ == "__main__":
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    mx.set_default_device(mx.cpu)
    cases = []
    for case in CASES:
        case = {**PLAIN, **case}
        tensors = convert(models / case["model"], case)
        forms = {name: fingerprint(tensors[name]) for name in sorted(tensors)}
        cases.append({**case, "tensors": forms})
    # The same operations round differently on another kind of processor.
    goldens = {"machine": platform.machine(), "cases": cases}
    out.write_text(json.dumps(goldens, indent=1) + "\n")
