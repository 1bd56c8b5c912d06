"""Tokens a second, prefill and decoding, phimlx beside mlx-lm on the same random model.

    python scripts/bench/decode.py [--runs 9] [--bits 4] [--prompt 256 1024] [--seconds 60]
        [--cpu-time]

The model has Phi-4-mini's architecture, small enough for any machine. Runs alternate for so many
times or seconds, in another order each time; ratios are of medians (above 1: phimlx is quicker),
and times are not comparable between machines. --cpu-time counts what the process's threads compute,
for a machine that others use at the same time. Needs mlx-lm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import blas  # noqa: F401
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, load_model
from phimlx.generation.engine import Engine
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling

CONFIG = {
    "model_type": "phi3", "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 2816, "vocab_size": 32000,
    "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "eos_token_id": 2,
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)],
    },
}  # fmt: skip
REPLY = 32  # tokens

Run = Callable[[int], tuple[float, float]]
"""Seconds to the first token after a prompt of so many, and from there to the last."""


def ours(folder: Path, bits: int | None) -> Run:
    model = load_model(Checkpoint(folder), mx.float32)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    engine = Engine(model)

    def run(length: int) -> tuple[float, float]:
        prompt = list(range(10, 10 + length))
        return timed(
            engine.run(Request(prompt, Sampler(Sampling(), 0), REPLY, prompt_lookup=False))
        )

    return run


def theirs(folder: Path, bits: int | None) -> Run:
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model as load_theirs

    model, _ = load_theirs(folder)
    model.set_dtype(mx.float32)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)

    def run(length: int) -> tuple[float, float]:
        return timed(generate_step(mx.arange(10, 10 + length), model, max_tokens=REPLY))

    return run


clock = time.perf_counter


def timed(tokens: Iterator[object]) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    start = clock()
    next(tokens)
    first = clock()
    for _ in tokens:
        pass
    return first - start, clock() - first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--bits", type=int, default=None)
    parser.add_argument("--prompt", type=int, nargs="+", default=[256, 1024], metavar="TOKENS")
    parser.add_argument("--seconds", type=float, default=60, help="for all runs together")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds, not the clock's"
    )
    arguments = parser.parse_args()
    if arguments.cpu_time:
        global clock
        clock = time.process_time
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
    for run in sides.values():
        run(16)
    share = arguments.seconds / len(arguments.prompt)
    for length in arguments.prompt:
        times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        end = time.perf_counter() + share
        order = list(sides)
        for count in range(arguments.runs):
            if count and time.perf_counter() > end:
                break
            for side in order:
                times[side].append(sides[side](length))
            order.reverse()
        print(f"{length} tokens, {len(times['phimlx'])} runs each")
        for index, (what, tokens) in enumerate([("prefill", length), ("decode", REPLY - 1)]):
            rates = {
                side: tokens / statistics.median(pair[index] for pair in pairs)
                for side, pairs in times.items()
            }
            print(
                f"  {what:8} phimlx {rates['phimlx']:8.1f}/s   mlx-lm {rates['mlx-lm']:8.1f}/s   "
                f"ratio {rates['phimlx'] / rates['mlx-lm']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
