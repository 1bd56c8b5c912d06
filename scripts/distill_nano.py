#!/usr/bin/env python3
"""Shows what distillation is worth: nano cut to two layers, taught sums with and without a teacher.

    python scripts/distill_nano.py /tmp/distill-nano

Rows of sums are written, and a student of nano's first and last layer, in float32. It learns the
same rows by `phimlx train` and by `phimlx distill`, one command each, and is asked sums that are in
no row. Printed is how much of what plain training leaves to the teacher's share of right answers
distillation regains; half of it is asked for. Some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx

from phimlx.hub.resolve import NANO

KEPT = (0, 3)  # layers of nano
ROWS, HELD_OUT, EPOCHS, TEMPERATURE = 3000, 300, 8, 2.5
FORMS = (
    *("What is {a} + {b}?", "{a}+{b}", "Add {a} and {b}.", "How much is {a} plus {b}?"),
    "Calculate {a} + {b}.",
)
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    write_rows(folder)
    student = write_student(folder / "student")
    common = ["--data", folder / "train.jsonl", "--fine-tune-type", "full",
              "--learning-rate", "1e-3", "--batch-size", "32", "--epochs", EPOCHS,
              "--valid-fraction", "0"]  # fmt: skip
    phimlx("train", "--model", student, "--adapter-path", folder / "plain", *common)
    phimlx("distill", "--teacher", "nano", "--student", student, "--adapter-path",
           folder / "distilled", "--temperature", TEMPERATURE, *common)  # fmt: skip
    teacher = right(folder, "nano")
    plain = right(folder, student, "--adapter-path", folder / "plain")
    distilled = right(folder, student, "--adapter-path", folder / "distilled")
    regained = (distilled - plain) / (teacher - plain)
    print(f"teacher {teacher:.1%}  plain {plain:.1%}  distilled {distilled:.1%}")
    print(f"regained {regained:.1%} of the gap")
    sys.exit(regained < 0.5)


def write_rows(folder: Path) -> None:
    """Write sums to learn, and others to ask, of which none is in both."""
    random.seed(0)
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.shuffle(pairs)
    chosen = {"test": pairs[:HELD_OUT], "train": pairs[HELD_OUT : HELD_OUT + ROWS]}
    for name, sums in chosen.items():
        rows = [
            {"prompt": random.choice(FORMS).format(a=a, b=b), "completion": str(a + b)}
            for a, b in sums
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_student(folder: Path) -> Path:
    """Write nano with some of its layers, in float32."""
    folder.mkdir()
    weights: dict[str, mx.array] = {}
    stored: Any = mx.load(str(NANO / "model.safetensors"))
    for name, array in stored.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in KEPT:
                continue
            parts[2] = str(KEPT.index(int(parts[2])))
        weights[".".join(parts)] = array.astype(mx.float32)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    config = json.loads((NANO / "config.json").read_text())
    config |= {"num_hidden_layers": len(KEPT), "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in FILES:
        shutil.copyfile(NANO / name, folder / name)
    return folder


def right(folder: Path, model: str | Path, *more: str | Path) -> float:
    """Ask the held-out sums; the share of right answers."""
    asked = ["--data", folder / "test.jsonl", "--answers", "--max-tokens", "8", "--json"]
    found = phimlx("evaluate", "--model", model, *more, *asked, capture=True)
    return float(json.loads(found)["exact_match"])


def phimlx(*arguments: object, capture: bool = False) -> str:
    """Run a command, which is shown; on Linux with the system's BLAS, where it has a fast one."""
    words = list(map(str, arguments))
    print("$", shlex.join(["phimlx", *words]), flush=True)
    environment = dict(os.environ)
    if libraries := glob("/usr/lib/*/openblas-pthread/libopenblas.so.0"):
        environment["LD_PRELOAD"] = libraries[0]
    command = [sys.executable, "-m", "phimlx", *words]
    stdout = subprocess.PIPE if capture else None
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, check=True, text=True, stdout=stdout, cwd=root)
    return done.stdout or ""


if __name__ == "__main__":
    main()
