"""What models answer, alone or shared: `python -m tests.sharing.answers OUT LOADED KIND=FOLDER...`.

LOADED is only loaded, and the memory of that measured. Under `mlx.launch` the machines share one
model of a FOLDER after the other; the first writes the answers, and each what loading took.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

import phimlx
import tests.conftest  # noqa: F401 (the same BLAS as in the run that it is compared with)
from phimlx.api import Phi
from phimlx.generation.options import GenerationOptions
from phimlx.machine.processes import ProcessGroup
from phimlx.shared_model import Machines, follow
from tests.generation.small import STEP, words
from tests.reasoning_vision import picture

ADAPTERS = "adapters"  # beside a model's folder
GREEDY = {"temperature": 0, "max_tokens": 4}
SEEDED: dict[str, Any] = {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 7}


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


def adapted(load: Load, folder: Path) -> dict[str, Any]:
    """Tokens and logits of a model with adapters, of its own and in batches."""
    adapters = folder.parent / ADAPTERS
    phi = load(folder, adapters / "dora")
    found: dict[str, Any] = {"dora": phi.generate(words(20), **GREEDY).tokens}
    for name in ("lora", "bias"):
        phi.load_adapter(adapters / name, name)
        found[name] = phi.generate(words(20), adapter=name, **SEEDED, max_tokens=4).tokens
        cache = phi.new_cache()
        phi.generate(words(9), adapter=name, cache=cache, **GREEDY)
        found[f"{name}, logits"] = phi.model(mx.array([words(5, 9)]), cache.kv)[0].tolist()
    phi.delete_adapter("bias")
    names = ("default", "lora", "default", "lora")
    requests = [
        phi.request(words(12 + 9 * row, row), GenerationOptions(adapter=name, **GREEDY))
        for row, name in enumerate(names)
    ]
    phi.engine.run_all(requests)
    found["batch"] = [request.reply.tokens for request in requests]
    return found


def shown(load: Load, folder: Path) -> dict[str, Any]:
    """Tokens of prompts with pictures and sounds, alone, and in batches after each other."""
    phi = load(folder)
    one, other = (picture(seed) for seed in (1, 2))
    hum = (np.sin(np.arange(12_000) / 9).astype(np.float32), 16_000)
    asked: list[dict[str, Any]] = [{}, {"images": [one, other]}]
    if phi.hears:
        asked += [{"audio": hum}, {"images": other, "audio": hum}]
    found: dict[str, Any] = {}
    found["alone"] = phi.generate("What is it?", **asked[-1], **SEEDED, max_tokens=5).tokens
    for turn in range(2):  # of which the second goes on from what the first left
        requests = [phi.request("So?", GenerationOptions(**media, **GREEDY)) for media in asked]
        phi.engine.add(*requests)
        while phi.engine.busy:
            phi.engine.step()
        found[f"turn {turn}"] = [
            [request.reply.stats.cached_tokens, *request.reply.tokens] for request in requests
        ]
    return found


Load = Callable[..., Phi]
KINDS: Mapping[str, Callable[[Load, Path], dict[str, Any]]] = {
    "text": lambda load, folder: answers(load(folder)),
    "adapted": adapted,
    "shown": shown,
}


def answered(kind: str, load: Load, folder: Path) -> dict[str, Any]:
    """What a model answers, after which it is gone."""
    found = KINDS[kind](load, folder)
    gc.collect()
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
    out, wide = map(Path, sys.argv[1:3])
    processes = ProcessGroup.join()
    found: dict[str, Any] = {"memory": memory_of(wide, processes.group)}
    if processes.is_main:
        machines = Machines(processes)

        def load(folder: Path, adapter: Path | None = None) -> Phi:
            return phimlx.load(folder, adapter, "float32", machines=machines)

        try:
            for given in sys.argv[3:]:
                kind, _, folder = given.partition("=")
                found[given] = answered(kind, load, Path(folder))
        finally:
            machines.end()
    else:
        follow(processes)
    out.with_suffix(f".{processes.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
