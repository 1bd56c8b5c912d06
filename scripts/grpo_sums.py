#!/usr/bin/env python3
"""Shows that GRPO raises the held-out share of right sums from what supervised training gave.

    python scripts/grpo_sums.py [FOLDER] [--steps 80]

phi-4-nano adds two numbers; here it is to add three, which it was never taught. It sees a few sums
with their answers (SFT, fused), and then only prompts: its own answers are rewarded where they are
right, and a little where they are near. Every step is a command of phimlx, in float32, which a CPU
computes faster; what is there already is not done again. The last command compares both models on
sums that neither has seen.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
LARGEST, TAUGHT = 9, 200
REWARDS = '''"""Rewards for sums: 1 for the right one, less the farther an answer is from it."""


def near(completions, completion, **columns):
    return [0.2 * closeness(*pair) for pair in zip(completions, completion, strict=True)]


def closeness(answer, right):
    try:
        return max(0.0, 1 - abs(int(answer) - int(right)) / 10)
    except ValueError:
        return 0.0
'''


def sums() -> dict[str, list[dict[str, str]]]:
    """Rows to be taught, to be asked and to be held out, which is decided by their operands."""
    chosen = list(product(range(LARGEST + 1), repeat=3))
    random.Random(5).shuffle(chosen)
    others = [each for each in chosen if not is_held_out(each)]
    parts = {
        "taught": others[:TAUGHT],
        "asked": others[TAUGHT:],
        "held-out": [each for each in chosen if is_held_out(each)],
    }
    return {name: [row(*each) for each in part] for name, part in parts.items()}


def is_held_out(operands: tuple[int, ...]) -> bool:
    """Whether a sum is never seen, in no order."""
    digest = hashlib.blake2b(json.dumps(sorted(operands)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 8 == 0


def row(a: int, b: int, c: int) -> dict[str, str]:
    return {"prompt": f"{a}+{b}+{c}", "completion": str(a + b + c)}


def phimlx(*words: object, made: Path | None = None) -> str:
    """Run a command, unless what it makes is there."""
    command = [sys.executable, "-m", "phimlx", *map(str, words)]
    if made is not None and made.exists():
        return ""
    print("\n$ phimlx", *words, flush=True)
    # MLX's Linux wheel carries a BLAS that is many times slower than the system's.
    fast = glob.glob("/usr/lib/*/openblas-pthread/libopenblas.so.0")
    environment = {**os.environ, **({"LD_PRELOAD": fast[0]} if fast else {})}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("grpo-sums"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--epochs", type=float, default=15)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in ("taught", "asked", "held-out")}
    for name, rows in sums().items():
        files[name].write_text("".join(json.dumps(each) + "\n" for each in rows))
    rewards = folder / "rewards.py"
    rewards.write_text(REWARDS)
    base, taught, sft, grpo = (folder / name for name in ("nano", "taught", "sft", "grpo"))

    phimlx("convert", "nano", "--mlx-path", base, "--dtype", "float32", made=base)
    phimlx(
        *("train", "--model", base, "--data", files["taught"], "--adapter-path", taught),
        *("--epochs", arguments.epochs, "--batch-size", 16, "--learning-rate", 1e-3),
        *("--valid-fraction", 0, "--steps-per-report", 10),
        made=taught / "README.md",
    )
    phimlx("fuse", "--model", base, "--adapter-path", taught, "--save-path", sft, made=sft)
    phimlx(
        *("train", "--model", sft, "--data", files["asked"], "--adapter-path", grpo),
        *("--method", "grpo", "--reward", "exact", "--reward", f"{rewards}:near"),
        *("--iters", arguments.steps, "--batch-size", 8, "--group-size", 8, "--max-tokens", 4),
        *("--learning-rate", 5e-4, "--lr-schedule", "constant", "--beta", 0.01),
        *("--valid-fraction", 0, "--steps-per-report", 5),
        made=grpo / "README.md",
    )
    measured = ("--data", files["held-out"], "--answers", "--max-tokens", 4)
    for sides in ((base, sft), (sft, grpo)):
        print(phimlx("evaluate", "--model", sft, "--compare", *sides, *measured))


if __name__ == "__main__":
    main()
