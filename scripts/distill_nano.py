#!/usr/bin/env python3
"""Shows what distillation is worth: nano cut to two layers, taught sums with and without a teacher.

    python scripts/distill_nano.py /tmp/distill-nano

There are many questions and few answers to them. A student of nano's first and last layer learns
the rows that have answers by `phimlx train`; these same rows with nano's probabilities along their
answers by `phimlx distill`; and every question by `phimlx distill --via both`, where nano answers
those that nobody has. One command each, of as many steps. The learning rate of each is the one that
is best on sums kept for choosing, and what counts are others, which are in no row in either order.

Printed is how much of what plain training leaves to the teacher's share of right answers comes
back: of the same rows two fifths, of every question two thirds, in the log beside this file, which
is of a run on two busy cores.
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
import time
from glob import glob
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx

from phimlx.hub.resolve import NANO

KEPT = (0, 3)  # layers of nano
ROWS = {"test": 300, "valid": 200, "answered": 500, "open": 1800}  # sums
STEPS, BATCH, TEMPERATURE = 800, 32, 8
RATES = ("3e-4", "6e-4")
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
    begun = time.monotonic()
    write_rows(folder)
    student, teacher = write_student(folder / "student"), folder / "teacher"
    # A CPU computes in float32 several times as fast.
    phimlx("convert", "--model", "nano", "--mlx-path", teacher, "--dtype", "float32", "--json",
           capture=True)  # fmt: skip
    common = ["--fine-tune-type", "full", "--batch-size", BATCH, "--iters", STEPS,
              "--valid-fraction", "0"]  # fmt: skip
    # At a high temperature the unlikely tokens tell what the teacher knows: more of them are kept.
    distill = ["distill", "--teacher", teacher, "--student", student, "--temperature", TEMPERATURE,
               "--top-k", "512"]  # fmt: skip
    answered, questions = folder / "answered.jsonl", folder / "questions.jsonl"
    ways: dict[str, list[object]] = {
        "plain, rows with answers": ["train", "--model", student, "--data", answered],
        "distilled, the same rows": [
            *distill, "--data", answered, "--teacher-data", folder / "probabilities",
        ],
        "distilled, every question": [
            *distill, "--data", questions, "--teacher-data", folder / "answers", "--via", "both",
            "--answer-tokens", "8", "--answer-batch", BATCH,
        ],
    }  # fmt: skip
    found = {"teacher": ("", 0.0, right(folder / "test.jsonl", teacher))}
    for number, (way, words) in enumerate(ways.items()):
        tried = {}
        for rate in RATES:
            adapter = folder / f"{number}-{rate}"
            phimlx(*words, "--adapter-path", adapter, "--learning-rate", rate, *common)
            tried[rate] = right(folder / "valid.jsonl", student, "--adapter-path", adapter)
            print(f"{way}, rate {rate}: {tried[rate]:.1%} of the sums to choose by", flush=True)
        rate = max(RATES, key=lambda rate: tried[rate])
        adapter = folder / f"{number}-{rate}"
        score = right(folder / "test.jsonl", student, "--adapter-path", adapter)
        found[way] = rate, tried[rate], score
    whole, plain = found["teacher"][2], found["plain, rows with answers"][2]
    regained = {way: (score - plain) / (whole - plain) for way, (_, _, score) in found.items()}
    for way, (rate, chosen, score) in found.items():
        told = f"{chosen:6.1%} at rate {rate}" if rate else ""
        print(f"{way:25}  to choose by {told:20}  held out {score:6.1%}  gap {regained[way]:7.1%}")
    print(f"{time.monotonic() - begun:.0f} s")
    sys.exit(regained["distilled, every question"] < 0.5)


def write_rows(folder: Path) -> None:
    """Write sums to learn, to choose by and to judge by, none of them in two of these."""
    random.seed(0)
    pairs = list(combinations_with_replacement(range(100), 2))
    random.shuffle(pairs)
    rows: dict[str, list[dict[str, str]]] = {}
    for name, count in ROWS.items():
        chosen, pairs = pairs[:count], pairs[count:]
        rows[name] = []
        for pair in chosen:
            a, b = random.sample(pair, 2)
            question = random.choice(FORMS).format(a=a, b=b)
            rows[name].append({"prompt": question, "completion": str(a + b)})
    asked = [{"prompt": row["prompt"]} for row in (*rows["answered"], *rows.pop("open"))]
    for name, each in {**rows, "questions": asked}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))


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


def right(data: Path, model: str | Path, *more: str | Path) -> float:
    """Ask sums; the share of right answers."""
    asked = ["--data", data, "--answers", "--max-tokens", "8", "--batch-size", "32", "--json"]
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
