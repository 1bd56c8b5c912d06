"""Importance of mlp channels and key/value heads, and logits without some, by transformers.

    python scripts/goldens/prune_goldens.py MODELS tests/goldens/prune.safetensors
    python scripts/goldens/prune_goldens.py --same FOLDER

The first hooks the projections that read channels and heads in the tiny checkpoints of a folder,
and computes sqrt(Σ over columns of mean x² · Σ W²) in float64; then it puts zeros where the least
important are read, which is leaving them out. It needs no word of how phimlx cuts. The second
prints the logits of a folder for the same tokens as JSON. Made with transformers 5.24.0 and torch
2.13.0, which phimlx itself never needs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

MODELS = {
    "tiny-phi4": ("self_attn.o_proj", "mlp.down_proj"),
    "tiny-phi4-mini": ("self_attn.o_proj", "mlp.down_proj"),
    "tiny-phi2": ("self_attn.dense", "mlp.fc2"),
}
ROWS, LENGTH, SEED, STAY = 3, 24, 7, 64


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "--same":
        model = load(Path(sys.argv[2]))
        print(json.dumps(logits(model)[:, ::8].tolist()))
        return
    found: dict[str, np.ndarray] = {}
    for name, paths in MODELS.items():
        found |= measure(load(Path(sys.argv[1]) / name), name, *paths)
    save_file(found, sys.argv[2])


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens(model: Any) -> torch.Tensor:
    random = np.random.default_rng(SEED)
    return torch.tensor(random.integers(4, min(500, model.config.vocab_size), (ROWS, LENGTH)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens(model)).logits
    return found


def measure(model: Any, name: str, attention: str, mlp: str) -> dict[str, np.ndarray]:
    groups = model.config.num_key_value_heads
    inputs: dict[tuple[int, str], torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        for path in (attention, mlp):

            def keep(module: Any, given: Any, key: tuple[int, str] = (number, path)) -> None:
                inputs[key] = given[0].detach().double().reshape(-1, given[0].shape[-1])

            layer.get_submodule(path).register_forward_pre_hook(keep)
    found = {f"{name}.tokens": tokens(model).numpy().astype(np.int32)}
    logits(model)
    importance: dict[str, list[torch.Tensor]] = {"heads": [], "mlp": []}
    for number, layer in enumerate(model.model.layers):
        for key, path, units in (("heads", attention, groups), ("mlp", mlp, 0)):
            module, x = layer.get_submodule(path), inputs[number, path]
            weight = module.weight.detach().double()
            columns = (x**2).mean(0) * (weight**2).sum(0)
            each = columns.reshape(units or len(columns), -1).sum(1).sqrt()
            importance[key].append(each)
            gone = each.argsort()[: len(each) - (STAY if key == "mlp" else max(1, groups // 2))]
            with torch.no_grad():
                module.weight.view(module.weight.shape[0], len(each), -1)[:, gone] = 0
    found |= {f"{name}.{key}": torch.stack(each).numpy() for key, each in importance.items()}
    # save_file would write what lies in memory, not what a slice shows of it.
    return {**found, f"{name}.logits": np.ascontiguousarray(logits(model)[:, ::8].numpy())}


if __name__ == "__main__":
    main()
