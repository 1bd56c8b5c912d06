#!/usr/bin/env python3
"""Shows that GRPO raises the held-out share of right sums from what supervised training gave.

    python scripts/grpo_sums.py [FOLDER] [--steps 40]

phi-4-nano adds numbers when it is asked as it was taught; here it is asked in words that it never
saw. It is shown a few sums with their answers (SFT, fused), and then only prompts: its own answers
are rewarded where they are right, and a little where they are near. Every step is a command of
phimlx, in float32, which a CPU computes faster; what is there already is not done again. The last
commands compare the models on 120 sums that none has seen. On Linux's CPU it took three minutes:

    right answers      nano 5.0 %, after SFT 80.0 %, after GRPO 90.8 %
    GRPO less SFT      +10.8 points, +4.2 to +17.5 in 95 % of resampled rows
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
LARGEST, TAUGHT, ASKED, HELD_OUT = 99, 64, 1000, 120
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
    chosen = list(product(range(LARGEST + 1), repeat=2))
    random.Random(5).shuffle(chosen)
    others = [each for each in chosen if not is_held_out(each)]
    parts = {
        "taught": others[:TAUGHT],
        "asked": others[TAUGHT : TAUGHT + ASKED],
        "held-out": [each for each in chosen if is_held_out(each)][:HELD_OUT],
    }
    return {name: [row(*each) for each in part] for name, part in parts.items()}


def is_held_out(operands: tuple[int, ...]) -> bool:
    """Whether a sum is never seen, in no order."""
    digest = hashlib.blake2b(json.dumps(sorted(operands)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 8 == 0


def row(a: int, b: int) -> dict[str, str]:
    return {"prompt": f"{a} and {b} make", "completion": str(a + b)}


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
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--epochs", type=float, default=6)
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
        *("--epochs", arguments.epochs, "--batch-size", 8, "--learning-rate", 3e-4),
        *("--valid-fraction", 0, "--steps-per-report", 10),
        made=taught / "README.md",
    )
    phimlx("fuse", "--model", base, "--adapter-path", taught, "--save-path", sft, made=sft)
    phimlx(
        *("train", "--model", sft, "--data", files["asked"], "--adapter-path", grpo),
        *("--method", "grpo", "--reward", "exact", "--reward", f"{rewards}:near"),
        *("--iters", arguments.steps, "--batch-size", 4, "--group-size", 8, "--max-tokens", 4),
        *("--learning-rate", 1e-4, "--beta", 0.04),
        *("--valid-fraction", 0, "--steps-per-report", 5),
        made=grpo / "README.md",
    )
    measured = ("--data", files["held-out"], "--answers", "--max-tokens", 4)
    for sides in ((base, sft), (sft, grpo)):
        print(phimlx("evaluate", "--model", sft, "--compare", *sides, *measured))


if __name__ == "__main__":
    main()
