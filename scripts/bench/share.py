"""Speed of two processes of this machine that share a model, beside one that has it whole.

    python scripts/bench/share.py [MODEL] [--runs 3] [--context 128 512] [--rows 1 4]

Each run is `phimlx bench`, alone and under `mlx.launch -n 2` over MLX's ring, in turn; ratios are
of medians (above 1: two are quicker). MODEL is a name or a folder; a random one of 120 million
parameters where it is left out. On one machine both processes have its cores and memory between
them, so that this tells what working together costs; several Macs are measured by the same command
with their own host file: `mlx.launch --hostfile macs.json -- phimlx bench --model MODEL --json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from batch import CONFIG

LAUNCH = Path(sys.executable).parent / "mlx.launch"


def make_model(folder: Path) -> Path:
    """Write the random model."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from phimlx.checkpoint.load import build_model

    (folder / "config.json").write_text(json.dumps(CONFIG))
    mx.random.seed(0)
    weights: Any = dict(tree_flatten(build_model(CONFIG).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def measure(command: list[str]) -> dict[tuple[str, int], float]:
    """Tokens a second by what was measured: of prefill and decoding, and of rows together."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True
    )
    report = json.loads(done.stdout)
    found = {(what, each["context"]): each[what]
             for each in report["contexts"] for what in ("prefill", "decode")}  # fmt: skip
    return found | {("rows", each["rows"]): each["decode"] for each in report["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--context", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        model = given.model or str(make_model(Path(place)))
        bench = [sys.executable, "-m", "phimlx", "bench", "--model", model, "--json"]
        bench += ["--runs", "1", "--tokens", "16"]
        bench += [f"--context={length}" for length in given.context]
        bench += [f"--batch-size={rows}" for rows in given.rows]
        commands = {"one": bench, "two": [str(LAUNCH), "-n", "2", "--", *bench]}
        times: dict[str, list[dict[tuple[str, int], float]]] = {name: [] for name in commands}
        for _ in range(given.runs):
            for name, command in commands.items():
                times[name].append(measure(command))
    print(f"{'':<16}{'one/s':>10}{'two/s':>10}{'ratio':>8}")
    for key in times["one"][0]:
        one, two = (statistics.median(run[key] for run in times[name]) for name in commands)
        print(f"{key[0]:<8}{key[1]:>6}  {one:>10,.1f}{two:>10,.1f}{two / one:>8.2f}")


if __name__ == "__main__":
    main()
