"""How long from the command to its first token, phimlx beside mlx-lm.

    python scripts/bench/startup.py TOKENIZER_FOLDER [--runs 7]

TOKENIZER_FOLDER holds the real files of Phi-4-mini-instruct (config.json, tokenizer.json,
tokenizer_config.json, generation_config.json); the weights are made here, tiny and random, for its
whole vocabulary of 200,064. Runs alternate, ratios are of medians, and times are not comparable
between machines. Needs mlx-lm.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TINY = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 256,
}  # fmt: skip
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
PROMPT = ["--prompt", "Name three colours.", "--max-tokens", "8"]


def make_model(source: Path, folder: Path, shape: Mapping[str, int] = TINY) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from phimlx.checkpoint.load import build_model

    config = {**json.loads((source / "config.json").read_text()), **shape}
    (folder / "config.json").write_text(json.dumps(config))
    for name in FILES:
        shutil.copy(source / name, folder / name)
    mx.random.seed(0)
    model = build_model(config)
    model.set_dtype(mx.bfloat16)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def first_output(command: Sequence[str]) -> float:
    """Seconds until the command writes its first byte; it is then left to finish."""
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.communicate()
    if not first or process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return seconds


def compare(title: str, ours: Sequence[str], theirs: Sequence[str], runs: int) -> None:
    times: dict[str, list[float]] = {"phimlx": [], "mlx-lm": []}
    for command in (ours, theirs):
        first_output(command)  # once to fill the disk cache
    for _ in range(runs):
        times["phimlx"].append(first_output(ours))
        times["mlx-lm"].append(first_output(theirs))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["phimlx"] / medians["mlx-lm"]
    print(
        f"{title:26} phimlx {medians['phimlx']:6.3f} s   mlx-lm {medians['mlx-lm']:6.3f} s   "
        f"ratio {ratio:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    phimlx, mlx_lm = ([sys.executable, "-m", name] for name in ("phimlx", "mlx_lm.generate"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        make_model(arguments.tokenizer, Path(folder))
        compare("--help", [*phimlx, "--help"], [*mlx_lm, "--help"], arguments.runs)
        compare(
            "command to first token",
            [*phimlx, "generate", "--model", folder, *PROMPT],
            [*mlx_lm, "--model", folder, *PROMPT],
            arguments.runs,
        )


if __name__ == "__main__":
    main()
