"""How long a second question about a long text takes, in a new process, beside the first.

    python scripts/bench/prefix.py TOKENIZER_FOLDER [--tokens 8000] [--runs 1] [--kv-bits 8]

TOKENIZER_FOLDER holds the real files of Phi-4-mini-instruct (config.json, tokenizer.json,
tokenizer_config.json, generation_config.json); the weights are made here, small and random, for its
whole vocabulary. The text is this repository's own source. Each run is two processes with an empty
cache folder between runs: they ask different things about the same text, with `phimlx generate`'s
own store, and a third asks the second question without it, which must give the same tokens. Times
are medians, not comparable between machines; the target is 0.2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from startup import make_model

ROOT = Path(__file__).parents[2]
SHAPE = {
    "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 512,
}  # fmt: skip
QUESTIONS = ("What does the first function do?", "Which classes raise an error, and when?")


def text_of(folder: Path, tokens: int) -> str:
    """Read as much of phimlx's source as has so many tokens."""
    from phimlx.prompt.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    files = sorted((ROOT / "phimlx").rglob("*.py"))
    source = "\n".join(file.read_text() for file in files)[: 12 * tokens]
    return tokenizer.decode(tokenizer.encode(source)[:tokens])


def ask(folder: str, question: str, kv_bits: int | None, keeps: bool) -> dict[str, Any]:
    """Ask in this process; BEGUN in the environment is when it was started."""
    import phimlx

    phi = phimlx.load(folder, dtype="float32")
    store = phi.prefix_store(print) if keeps else None
    cache = phi.new_cache(kv_bits, store)
    begun = time.time()
    text = Path(folder, "text.txt").read_text()
    stream = phi.stream(f"{text}\n\n{question}", cache=cache, temperature=0, max_tokens=8)
    next(stream)
    first = time.time()
    reply = stream.result()
    saving = time.time()
    if store is not None:
        store.save(cache)
    return {
        "since_start": first - float(os.environ["BEGUN"]),
        "since_asked": first - begun,
        "saving": time.time() - saving,
        "prompt": reply.stats.prompt_tokens,
        "cached": reply.stats.cached_tokens,
        "tokens": reply.tokens,
    }


def in_new_process(folder: Path, question: str, kv_bits: int | None, keeps: bool) -> dict[str, Any]:
    given = json.dumps([str(folder), question, kv_bits, keeps])
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    environment |= {"HOME": str(folder), "BEGUN": str(time.time())}
    command = [sys.executable, __file__, "--asked", given, "-"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--kv-bits", type=int, choices=(8, 4))
    parser.add_argument("--asked", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.asked:
        print(json.dumps(ask(*json.loads(arguments.asked))))
        return
    times: dict[str, list[tuple[float, float]]] = {"first": [], "second": []}
    for run in range(arguments.runs):
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            make_model(arguments.tokenizer, folder, SHAPE)
            (folder / "text.txt").write_text(text_of(folder, arguments.tokens))
            first, second = (
                in_new_process(folder, question, arguments.kv_bits, True) for question in QUESTIONS
            )
            plain = in_new_process(folder, QUESTIONS[1], arguments.kv_bits, False)
        for name, found in (("first", first), ("second", second)):
            times[name].append((found["since_start"], found["since_asked"]))
        print(
            f"run {run + 1}: {second['prompt']} prompt tokens, {second['cached']} from the store, "
            f"{second['prompt'] - second['cached']} computed; same reply as without: "
            f"{second['tokens'] == plain['tokens']}; saved in {first['saving']:.2f} s"
        )
    for place, what in enumerate(("from the start of the process", "from the question")):
        one, other = (
            statistics.median(pair[place] for pair in times[name]) for name in ("first", "second")
        )
        print(
            f"first token {what:30} first {one:7.2f} s   second {other:7.2f} s   "
            f"ratio {other / one:.3f}"
        )


if __name__ == "__main__":
    main()
