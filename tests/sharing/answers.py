"""What a model answers, alone or shared: `python -m tests.sharing.answers OUT LOADED FOLDER...`.

LOADED is only loaded, and the memory of that measured. Under `mlx.launch` the machines share one
model of a FOLDER after the other; the first writes the answers, and each what loading took.
"""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

import phimlx
import tests.conftest  # noqa: F401 (the same BLAS as in the run that it is compared with)
from phimlx.api import Phi
from phimlx.machine.processes import ProcessGroup
from phimlx.shared_model import Machines, follow
from tests.generation.small import STEP, words

SEEDED = {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 7}


def answers(phi: Phi) -> dict[str, Any]:
    """Tokens by what was asked, of every way of generating, and logits."""
    again = [*words(8), *words(30, 5), *words(30, 5), *words(12, 5)]
    given = {"short": words(20), "over the step": words(STEP - 8), "long": words(STEP + 90)}
    found: dict[str, Any] = {}
    for name, prompt in given.items():
        for how, options in {"greedy": {"temperature": 0}, "seeded": SEEDED}.items():
            reply = phi.generate(prompt, max_tokens=10 if "step" in name else 4, **options)
            found[f"{name}, {how}"] = reply.tokens
        logits = phi.model(mx.array([prompt]))
        found[f"{name}, logits"] = logits[0, -3:].tolist()
    reply = phi.generate(again, max_tokens=24, temperature=0)
    found["drafted"] = [reply.stats.drafted_tokens, *reply.tokens]
    cache = phi.new_cache()
    for turn in ([*words(40), *words(9, 8)], [*words(25), *words(9, 8)]):
        reply = phi.generate(turn, max_tokens=4, cache=cache, **SEEDED)
        found[f"turn of {len(turn)}"] = [reply.stats.cached_tokens, *reply.tokens]
    prompts = [words(count, 3 + count) for count in (5, 60, STEP - 4, 33, STEP + 10, 61)]
    replies = phi.generate_all(prompts, max_tokens=8, batch_size=4)
    found["batch"] = [reply.tokens for reply in replies]
    found["kv_bits"] = phi.generate(words(50), max_tokens=4, temperature=0, kv_bits=8).tokens
    stopped = phi.stream(words(30), max_tokens=50, temperature=0)
    found["stopped"] = [next(stopped).token for _ in range(3)]
    stopped.close()
    found["afterwards"] = phi.generate(words(30), max_tokens=5, temperature=0).tokens
    return found


def loaded(load: Any) -> tuple[Any, dict[str, int]]:
    """Load, and tell the most memory that it took and what is held."""
    gc.collect()  # what others left would be freed meanwhile
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load()
    return model, {
        "peak": mx.get_peak_memory() - before,
        "held": mx.get_active_memory() - before,
    }


def memory_of(folder: Path, group: mx.distributed.Group | None) -> dict[str, int]:
    """Measure what it takes to load a model, or a machine's part of it."""
    from phimlx.checkpoint.folder import Checkpoint
    from phimlx.checkpoint.load import load_model

    model, taken = loaded(lambda: load_model(Checkpoint(folder), None, group))
    weights: Any = tree_flatten(model.parameters())
    return {**taken, "weights": sum(array.nbytes for _, array in weights)}


def main() -> None:
    """Share each model, and write what came."""
    out, wide, *folders = map(Path, sys.argv[1:])
    processes = ProcessGroup.join()
    found: dict[str, Any] = {"memory": memory_of(wide, processes.group)}
    for folder in folders:
        if not processes.is_main:
            follow(processes)
            continue
        machines = Machines(processes)
        try:
            phi = partial(phimlx.load, machines=machines)(folder)
            found[folder.name] = answers(phi)
        finally:
            machines.end()
    out.with_suffix(f".{processes.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
