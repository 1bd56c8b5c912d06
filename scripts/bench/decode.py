"""Tokens a second, prefill and decoding, phimlx beside mlx-lm on the same random model.

    python scripts/bench/decode.py [--runs 5] [--bits 4]

The model has Phi-4-mini's architecture, small enough for any machine. Runs alternate, ratios are of
medians (above 1: phimlx is quicker), and times are not comparable between machines. Needs mlx-lm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, load_model
from phimlx.generation.engine import Engine
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling

CONFIG = {
    "model_type": "phi3", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 2816, "vocab_size": 32000,
    "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "eos_token_id": 2,
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)],
    },
}  # fmt: skip
PROMPT, REPLY = 256, 64  # tokens


def ours(folder: Path, bits: int | None) -> Callable[[], tuple[float, float]]:
    model = load_model(Checkpoint(folder), mx.float32)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    engine, prompt = Engine(model), list(range(10, 10 + PROMPT))

    def run() -> tuple[float, float]:
        return timed(engine.run(Request(prompt, Sampler(Sampling(), 0), REPLY)))

    return run


def theirs(folder: Path, bits: int | None) -> Callable[[], tuple[float, float]]:
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model as load_theirs

    model, _ = load_theirs(folder)
    model.set_dtype(mx.float32)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    prompt = mx.arange(10, 10 + PROMPT)

    def run() -> tuple[float, float]:
        return timed(generate_step(prompt, model, max_tokens=REPLY))

    return run


def timed(tokens: object) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    start = time.perf_counter()
    first = None
    for _ in tokens:  # type: ignore[attr-defined]
        first = first or time.perf_counter()
    assert first is not None
    return first - start, time.perf_counter() - first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--bits", type=int, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        mx.random.seed(0)
        weights = dict(tree_flatten(build_model(CONFIG).parameters()))
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
        sides = {
            "phimlx": ours(folder, arguments.bits),
            "mlx-lm": theirs(folder, arguments.bits),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for run in sides.values():
            run()
        for _ in range(arguments.runs):
            for name, run in sides.items():
                times[name].append(run())
    for index, (what, count) in enumerate([("prefill", PROMPT), ("decode", REPLY - 1)]):
        rates = {
            name: count / statistics.median(pair[index] for pair in pairs)
            for name, pairs in times.items()
        }
        ratio = rates["phimlx"] / rates["mlx-lm"]
        print(
            f"{what:8} phimlx {rates['phimlx']:8.1f}/s   mlx-lm {rates['mlx-lm']:8.1f}/s   "
            f"ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
