"""Wall time and peak resident memory of a conversion, phimlx beside mlx-lm, warm and cold.

    python scripts/bench/convert.py [--layers 4] [--runs 3] [--bits 4] [--folder DIR]

The model has Phi-4-mini's shapes with fewer layers: 2.0 GB in bfloat16 with 4 of them, of which the
embedding alone takes 1.2 GB. Each run is a process of its own; sides alternate; what is timed is
the call, without the imports. Ratios are of medians (below 1: phimlx is quicker, or smaller). Cold
means that the source's pages have been dropped from the page cache (Linux). Needs mlx-lm.
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
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model
from phimlx.hub.resolve import NANO
from phimlx.sizes import size_text

CONFIG = {
    "model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8,
    "intermediate_size": 8192, "vocab_size": 200064, "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)],
    },
}  # fmt: skip

OURS = """
from convert import Quantization, convert
work = lambda source, out, bits: convert(source, out, Quantization(bits=bits))
"""
THEIRS = """
from mlx_lm.convert import convert
work = lambda source, out, bits: convert(source, out, quantize=True, q_bits=bits)
"""
TIMED = """
import contextlib, io, json, resource, sys, time
source, out, bits = sys.argv[1], sys.argv[2], int(sys.argv[3])
start = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    work(source, out, bits)
seconds = time.perf_counter() - start
if sys.platform == "linux":  # where ru_maxrss begins with that of the process that started this one
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak = 1024 * int(status["VmHWM"].split()[0])
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, peak]))
"""
SIDES = {"phimlx": OURS, "mlx-lm": THEIRS}


def write_model(folder: Path, layers: int) -> None:
    """Normal numbers, the same few million again and again, one layer a shard."""
    folder.mkdir()
    config = {**CONFIG, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(NANO / name, folder / name)
    numbers = (mx.random.normal((1 << 22,), key=mx.random.key(0)) * 0.02).astype(mx.bfloat16)
    shards: dict[str, dict[str, mx.array]] = {}
    for name, array in tree_flatten(build_model(config).parameters()):
        block = name.split(".")[2] if ".layers." in name else "rest"
        copies = -(-array.size // numbers.size)
        weight = mx.concatenate([numbers] * copies)[: array.size].reshape(array.shape)
        shards.setdefault(block, {})[name] = weight
    weight_map = {}
    for number, members in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        mx.save_safetensors(str(folder / file), members, {"format": "pt"})
        weight_map.update(dict.fromkeys(members, file))
        members.clear()
        mx.clear_cache()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run(side: str, source: Path, out: Path, bits: int) -> tuple[float, float]:
    """Seconds and peak resident bytes of one conversion."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", SIDES[side] + TIMED, str(source), str(out), str(bits)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, peak = json.loads(printed.splitlines()[-1])
    os.sync()  # what one side has not written yet is not the other's burden
    return seconds, peak


def drop(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def same_tensors(one: Path, other: Path) -> bool:
    mine, theirs = Checkpoint(one).weights(), Checkpoint(other).weights()
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype
        and mx.array_equal(mine[name].view(mx.uint8), theirs[name].view(mx.uint8))
        for name in mine
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument(
        "--folder", type=Path, help="where to work; a temporary folder if not given"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source = Path(name) / "source"
        write_model(source, arguments.layers)
        os.sync()
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        print(f"{size_text(size)} in bfloat16 to {arguments.bits} bits, {arguments.runs} runs each")
        for state in ("warm", "cold") if hasattr(os, "posix_fadvise") else ("warm",):
            results: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
            for _ in range(arguments.runs):
                for side in SIDES:
                    if state == "cold":
                        drop(source)
                    results[side].append(run(side, source, Path(name) / side, arguments.bits))
            seconds = {s: statistics.median(one for one, _ in r) for s, r in results.items()}
            peaks = {s: max(peak for _, peak in r) for s, r in results.items()}
            print(
                f"{state}   wall  phimlx {seconds['phimlx']:6.1f} s   mlx-lm "
                f"{seconds['mlx-lm']:6.1f} s   ratio {seconds['phimlx'] / seconds['mlx-lm']:.2f}\n"
                f"       peak  phimlx {size_text(peaks['phimlx']):>8}   mlx-lm "
                f"{size_text(peaks['mlx-lm']):>8}   ratio {peaks['phimlx'] / peaks['mlx-lm']:.2f}"
            )
        identical = same_tensors(Path(name) / "phimlx", Path(name) / "mlx-lm")
        print(f"tensors {'bit-identical' if identical else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
