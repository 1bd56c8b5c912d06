"""Time and memory of a training step beside mlx-lm's, on the same model, data and step count.

    python -P scripts/bench/train.py [--runs 3] [--case f32-512]

Each side runs in a process of its own, the two in turn; the ratios are what counts. The model has
random weights: hidden size 512, 4 layers, vocabulary 200,064, tied, with LoRA of rank 8 in every
projection. Memory is the peak over what the weights take. A fast BLAS, where the machine has one,
serves both sides.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

ROWS, VOCABULARY, HIDDEN, LAYERS = 4, 200_064, 512, 4
STEPS = 3  # the first is not timed
LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}
TARGETS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")

CONFIG = {
    "model_type": "phi3",
    "hidden_size": HIDDEN,
    "intermediate_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """One comparison, and the ratios that it should not pass."""

    dtype: str
    length: int
    masked: float  # share of the tokens that are not learned from
    checkpointing: bool
    memory: float
    time: float


CASES = {
    "f32-512": Case("float32", 512, 0.0, True, 0.25, 1.0),
    "f32-512-masked": Case("float32", 512, 0.6, True, 0.25, 0.6),
    "f32-1024": Case("float32", 1024, 0.0, True, 0.12, 1.0),
    "f32-1024-masked": Case("float32", 1024, 0.6, True, 0.12, 0.6),
    "bf16-256": Case("bfloat16", 256, 0.0, True, 1.0, 1.0),
    "bf16-256-masked": Case("bfloat16", 256, 0.6, True, 1.0, 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, CASES[options.case[0]])))
        return
    print(f"{'case':18}{'loss':>18}{'memory over weights':>26}{'step':>22}")
    for name in options.case or CASES:
        best: dict[str, dict[str, float]] = {}
        for _ in range(options.runs):
            for side in SIDES:
                command = [sys.executable, "-P", __file__, "--side", side, "--case", name]
                run = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(run.stdout.splitlines()[-1])
                best[side] = {
                    key: min(value, best.get(side, found)[key]) for key, value in found.items()
                }
        ours, theirs = best["phimlx"], best["mlx-lm"]
        memory, seconds = ours["memory"] / theirs["memory"], ours["seconds"] / theirs["seconds"]
        case = CASES[name]
        print(
            f"{name:18}{ours['loss']:9.4f}{theirs['loss']:9.4f}"
            f"{ours['memory'] / 1e9:7.2f}{theirs['memory'] / 1e9:7.2f} GB {memory:5.2f} x "
            f"(≤ {case.memory}){seconds:8.2f} x (≤ {case.time})",
            flush=True,
        )


def measure(side: str, case: Case) -> dict[str, float]:
    """Loss of the last step, seconds of the quickest, peak memory over the weights."""
    for library in glob.glob("/usr/lib/*/openblas-pthread/libopenblas.so.0"):
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    import mlx.core as mx
    import numpy as np

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, case.length + 1))
    step, base = SIDES[side](case, tokens.astype(np.int32))
    seconds = []
    for number in range(STEPS):
        if number == 1:
            mx.reset_peak_memory()
        start = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - start)
    return {"loss": loss, "seconds": min(seconds[1:]), "memory": mx.get_peak_memory() - base}


def prepared(model: Any, dtype: str) -> int:
    """Give a model its type, seeded weights and adapters; returns the bytes that it takes."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    keys = mx.random.split(mx.random.key(0), 200)
    shapes = sorted((name, array.shape) for name, array in tree_flatten(model.parameters()))
    weights = [
        (name, mx.ones(shape) if len(shape) == 1 else 0.02 * mx.random.normal(shape, key=key))
        for (name, shape), key in zip(shapes, keys, strict=False)
    ]
    model.load_weights(weights)
    model.set_dtype(getattr(mx, dtype))
    model.freeze()
    linear_to_lora_layers(model, LAYERS, {**LORA, "keys": set(TARGETS)})
    for (_, module), key in zip(model.named_modules(), keys, strict=False):
        if "lora_a" in module:
            module.lora_a = 0.05 * mx.random.normal(module.lora_a.shape, key=key)
            module.dropout = nn.Identity()
    model.train()
    mx.eval(model.parameters())
    del weights
    mx.clear_cache()
    return mx.get_active_memory()


def phimlx_side(case: Case, tokens: Any) -> tuple[Any, int]:
    import mlx.optimizers as optim
    import numpy as np

    from phimlx.models.phi3 import Phi3Config, Phi3ForCausalLM
    from phimlx.training.data.batches import Batches, Example
    from phimlx.training.step import TrainingStep

    model = Phi3ForCausalLM(Phi3Config.from_dict(CONFIG))
    base = prepared(model, case.dtype)
    first = round(case.length * case.masked)
    supervised = np.arange(case.length + 1) > first
    batch = next(Batches([Example(row, supervised) for row in tokens], ROWS).epoch(0))
    step = TrainingStep(model, optim.Adam(learning_rate=1e-4), checkpointing=case.checkpointing)
    return lambda: step(1, [batch]).loss, base


def mlx_lm_side(case: Case, tokens: Any) -> tuple[Any, int]:
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.models.phi3 import Model, ModelArgs
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint

    model = Model(ModelArgs.from_dict(CONFIG))
    base = prepared(model, case.dtype)
    if case.checkpointing:
        grad_checkpoint(model.layers[0])
    optimizer = optim.Adam(learning_rate=1e-4)
    batch = mx.array(tokens)
    # Its mask begins one place early: offset o learns from the o-th target on.
    lengths = mx.array([[round(case.length * case.masked) + 1, case.length]] * ROWS)
    value_and_grad = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def compiled() -> Any:
        (loss, _), gradients = value_and_grad(model, batch, lengths)
        optimizer.update(model, gradients)
        return loss

    def step() -> float:
        loss = compiled()
        mx.eval(state, loss)
        return float(loss)

    return step, base


SIDES = {"phimlx": phimlx_side, "mlx-lm": mlx_lm_side}

if __name__ == "__main__":
    main()
