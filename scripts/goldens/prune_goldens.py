"""Importance of mlp channels and key/value heads, and logits without some, by transformers.

    python scripts/goldens/prune_goldens.py importance MODELS tests/goldens/prune.safetensors
    python scripts/goldens/prune_goldens.py folders PRUNED tests/goldens/prune-folders.safetensors
    python scripts/goldens/prune_goldens.py multimodal tests/goldens/mm-native \\
        tests/goldens/prune-multimodal.safetensors

The first hooks the projections that read channels and heads in the tiny checkpoints of a folder,
and computes sqrt(Σ over columns of mean x² · Σ W²) in float64; then it puts zeros where the least
important are read, which is leaving them out. It needs no word of how phimlx cuts.

The second loads the folders that `python -m tests.convert.pruned MODELS PRUNED` has written, and
keeps what it found in each, and the logits or in which words transformers refused it. The third
takes the first layer out of a multimodal model, its adapters' parts too, and repeats the cases of
its `reference.safetensors`. Made with transformers 5.24.0, peft 0.21.2 and torch 2.13.0, which
phimlx itself never needs.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

MODELS = {
    "tiny-phi4": ("self_attn.o_proj", "mlp.down_proj"),
    "tiny-phi4-mini": ("self_attn.o_proj", "mlp.down_proj"),
    "tiny-phi2": ("self_attn.dense", "mlp.fc2"),
}
ROWS, LENGTH, SEED, STAY = 3, 24, 7, 64

Made = tuple[dict[str, np.ndarray], dict[str, str] | None]


def main() -> None:
    torch.set_num_threads(1)
    kind, source, target = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    found, about = {"importance": importance, "folders": folders, "multimodal": multimodal}[kind](
        source
    )
    save_file(found, target, about)


def importance(models: Path) -> Made:
    found: dict[str, np.ndarray] = {}
    for name, paths in MODELS.items():
        found |= measure(load(models / name), name, *paths)
    return found, None


def folders(pruned: Path) -> Made:
    """Logits of every folder, and what is in it; an error in the words of transformers instead."""
    found, about = {}, {}
    for folder in sorted(pruned.iterdir()):
        with safe_open(str(folder / "model.safetensors"), "numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
        told = {"config": json.loads((folder / "config.json").read_text()), "tensors": shapes}
        try:
            model = load(folder)
        except Exception as error:
            told["refused"] = f"{type(error).__name__}: {error}"
        else:
            # save_file would write what lies in memory, not what a slice shows of it.
            found[f"{folder.name}.tokens"] = tokens(model).numpy().astype(np.int32)
            found[f"{folder.name}.logits"] = np.ascontiguousarray(logits(model)[:, ::8].numpy())
        about[folder.name] = json.dumps(told)
    return found, about


def multimodal(folder: Path) -> Made:
    """Logits of the cases of a folder without its first layer, under the same names."""
    from mm_goldens import NAMES
    from peft import PeftModel
    from transformers import Phi4MultimodalForCausalLM

    base = Phi4MultimodalForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model = PeftModel.from_pretrained(base, str(folder / "vision-lora"), "vision").eval()
    model.load_adapter(str(folder / "speech-lora"), "speech")
    with safe_open(str(folder / "reference.safetensors"), "pt") as file:
        cases = json.loads(file.metadata()["cases"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    whole = [run_case(model, case, arrays, NAMES) for case in cases]
    for case, found in zip(cases, whole, strict=True):
        torch.testing.assert_close(found, arrays[case["logits"]], rtol=0, atol=1e-4)
    layers = base.model.layers
    del layers[0]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    base.config.num_hidden_layers = len(layers)
    return {case["logits"]: run_case(model, case, arrays, NAMES).numpy() for case in cases}, None


def run_case(
    model: Any, case: dict[str, Any], arrays: dict[str, torch.Tensor], names: dict[str, str]
) -> torch.Tensor:
    media = {names[key]: arrays[name] for key, name in case["media"].items()}
    if media:
        model.set_adapter("vision" if "image_pixel_values" in media else "speech")
    with torch.no_grad(), nullcontext() if media else model.disable_adapter():
        found: torch.Tensor = model(arrays[case["input_ids"]].long(), **media).logits[0]
    return found


def load(folder: Path) -> Any:
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    return model.eval()


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
