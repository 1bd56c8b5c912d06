"""Aggregate tokens a second of a continuous batch, phimlx beside mlx-lm on the same random model.

    python scripts/bench/batch.py [--runs 5] [--rows 1 4 8 16] [--adapters]

Requests arrive together, prompts and replies of several lengths, so that rows
leave at different steps; prompts are counted in the time. Runs alternate, ratios are of medians
(above 1: phimlx is quicker), and times are not comparable between machines. Needs mlx-lm. On Linux
load a fast BLAS first: `--blas /usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0`.

With --adapters it is phimlx alone, eight rows: without adapters, all with one, and with four or
eight in turn, LoRA of rank 16 on every projection; ratios are to all with one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phimlx.models.base import CausalLM

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
NAMES, RANK = "abcdefgh", 16  # of adapters
PROMPTS, REPLIES = (16, 40, 24, 64), (40, 64, 56, 48)  # tokens, in turn

Run = Callable[[int], tuple[float, list[list[int]]]]


def requests(rows: int) -> list[tuple[list[int], int]]:
    """Prompts, and how many tokens each reply has."""
    return [
        ([10 + (7 * row + 13 * i) % 30000 for i in range(PROMPTS[row % 4])], REPLIES[row % 4])
        for row in range(rows)
    ]


def ours(model: CausalLM, adapters: Sequence[str | None] = (None,)) -> Run:
    """Make a run whose rows use adapters of the model in turn."""
    from phimlx.generation.engine import Engine
    from phimlx.generation.request import Request
    from phimlx.generation.sampler import Sampler, Sampling

    engine = Engine(model)

    def run(rows: int) -> tuple[float, list[list[int]]]:
        asked = [
            Request(prompt, Sampler(Sampling(), 0), count, prompt_lookup=False, adapter=adapter)
            for (prompt, count), adapter in zip(requests(rows), cycle(adapters), strict=False)
        ]
        began = time.perf_counter()
        engine.add(*asked)
        while not all(request.finished for request in asked):
            engine.step()
        return time.perf_counter() - began, [request.reply.tokens for request in asked]

    return run


def with_adapters(folder: Path) -> dict[str, Run]:
    """By what the rows use, a run whose rows use the adapters of its list in turn."""
    import mlx.core as mx

    from phimlx.adapters.adapter import Adapter
    from phimlx.adapters.attach import load_adapter
    from phimlx.checkpoint.folder import Checkpoint
    from phimlx.checkpoint.load import load_model
    from phimlx.models.lora import LoRA

    model = load_model(Checkpoint(folder), mx.float32)
    shapes = model.config.projection_shapes
    for name in NAMES:
        layers = {
            f"model.layers.{number}.{projection}": LoRA(
                0.05 * mx.random.normal((width, RANK)), 0.05 * mx.random.normal((RANK, height)), 2.0
            )
            for number in range(model.config.num_hidden_layers)
            for projection, (width, height) in shapes.items()
        }
        load_adapter(model, Adapter(layers), name=name)
    used: dict[str, list[str | None]] = {
        "none": [None], "one": ["a"], "four": list(NAMES[:4]), "eight": list(NAMES)
    }  # fmt: skip
    return {name: ours(model, adapters) for name, adapters in used.items()}


def theirs(folder: Path) -> Run:
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)

    def run(rows: int) -> tuple[float, list[list[int]]]:
        prompts, counts = map(list, zip(*requests(rows), strict=True))
        began = time.perf_counter()
        generator = BatchGenerator(model, completion_batch_size=max(rows, 1))
        numbers = generator.insert(prompts, counts)
        replies: dict[int, list[int]] = {number: [] for number in numbers}
        ended: set[int] = set()
        while len(ended) < rows:
            for answer in generator.next_generated():
                replies[answer.uid].append(answer.token)
                if answer.finish_reason is not None:
                    ended.add(answer.uid)
        spent = time.perf_counter() - began
        generator.close()
        return spent, [replies[number] for number in numbers]

    return run


def make_model(folder: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from phimlx.checkpoint.load import build_model

    mx.random.seed(0)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    model = build_model(CONFIG)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))


def medians(sides: Mapping[str, Run], rows: int, runs: int) -> dict[str, float]:
    """Run sides in turn; the median of each one's tokens a second."""
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(runs + 1):
        for side, run in sides.items():
            spent, replies = run(rows)
            if number:  # the first warms up
                rates[side].append(sum(map(len, replies)) / spent)
    return {side: statistics.median(values) for side, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--adapters", action="store_true", help="compare rows of adapters instead")
    parser.add_argument("--blas", help="library that is loaded before MLX")
    options = parser.parse_args()
    if options.blas:
        ctypes.CDLL(options.blas, ctypes.RTLD_GLOBAL)
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name))
        if options.adapters:
            found = medians(with_adapters(Path(name)), 8, options.runs)
            for used, rate in found.items():
                print(f"{used:5} {rate:.1f} tokens/s, {rate / found['one']:.2f}x")
            return
        import mlx.core as mx

        from phimlx.checkpoint.folder import Checkpoint
        from phimlx.checkpoint.load import load_model

        model = load_model(Checkpoint(Path(name)), mx.float32)
        sides = {"phimlx": ours(model), "mlx-lm": theirs(Path(name))}
        single: dict[str, float] = {}
        print("aggregate tokens/s, median of alternating runs; x one row in brackets")
        for rows in options.rows:
            found = medians(sides, rows, options.runs)
            single = single or found
            text = ", ".join(
                f"{side} {rate:.1f} ({rate / single[side]:.2f}x)" for side, rate in found.items()
            )
            print(f"{rows:3} rows: {text}; {found['phimlx'] / found['mlx-lm']:.2f}x", flush=True)


if __name__ == "__main__":
    sys.exit(main())
