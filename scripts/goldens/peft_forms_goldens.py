"""Reference logits of every form of PEFT adapter that changes more than some linear layers.

    python scripts/goldens/peft_forms_goldens.py tests/goldens/peft-forms

Every adapter is saved, and its logits are those of a fresh base with what was saved loaded onto it.
Needs torch, transformers and peft, which phimlx itself never does (made with 2.13, 5.24, 0.21.2).
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

SEED = 411
TOKENS = 14

SHAPE = {
    "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
    "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "plain": lambda: Phi3ForCausalLM(Phi3Config(**SHAPE)),
    "tied": lambda: Phi3ForCausalLM(Phi3Config(**SHAPE | {"tie_word_embeddings": True})),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SHAPE | {"resid_pdrop": 0.0, "embd_pdrop": 0.0})),
}
O = {"r": 2, "lora_alpha": 3, "target_modules": ["o_proj"]}  # noqa: E741
PHI = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "dense", "fc1"]}
EMBEDDINGS = ["embed_tokens", "lm_head"]
# Model, LoraConfig, and what is special: see `make`.
ADAPTERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "saved-embeddings": ("plain", O, {"move": EMBEDDINGS, "save_embeddings": True}),
    "modules-to-save": ("plain", {**O, "modules_to_save": [*EMBEDDINGS, "norm"]}, {}),
    "whole-projections": (
        "plain", {**O, "modules_to_save": ["down_proj", "layers.0.self_attn.qkv_proj"]}, {},
    ),
    "tokens-list": ("plain", {**O, "trainable_token_indices": [3, 39, 7]}, {}),
    "tokens-dict": (
        "plain",
        {**O, "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [6, 2, 5]}},
        {},
    ),
    "embedding-and-head": ("plain", {**O, "target_modules": [*EMBEDDINGS, "o_proj"]}, {}),
    "embedding-base-moved": (
        "plain", {**O, "target_modules": [*EMBEDDINGS, "o_proj"]}, {"move": EMBEDDINGS},
    ),
    "embedding-dora": (
        "plain", {**O, "use_dora": True, "target_modules": [*EMBEDDINGS, "qkv_proj"]}, {},
    ),
    "lora-bias": ("plain", {**O, "lora_bias": True, "target_modules": ["o_proj", "lm_head"]}, {}),
    "patterns": (
        "plain",
        {
            "r": 2, "lora_alpha": 3, "target_modules": "all-linear",
            "exclude_modules": r".*\.0\.mlp\.down_proj", "fan_in_fan_out": True,
            "rank_pattern": {r".*\.(qkv|o)_proj": 4, r"layers\.1\.mlp\.\w+": 1},
            "alpha_pattern": {r"layers\.[01]\.self_attn\.qkv_proj": 8, "down_proj": 5},
            "use_rslora": True,
        },
        {},
    ),
    "layers": (
        "plain",
        {**O, "target_modules": r".*\.(o|qkv)_proj", "init_lora_weights": "orthogonal"},
        {},
    ),
    "pissa": ("plain", {**O, "init_lora_weights": "pissa", "target_modules": "all-linear"}, {}),
    "pissa-converted": ("plain", {**O, "init_lora_weights": "pissa_niter_4"}, {"convert": True}),
    "olora": ("plain", {**O, "init_lora_weights": "olora", "target_modules": "all-linear"}, {}),
    "mica": ("plain", {**O, "init_lora_weights": "mica"}, {}),
    "grown": ("plain", O, {"resize": 44, "save_embeddings": True}),
    "shrunk": ("plain", O, {"resize": 37, "save_embeddings": True}),
    "tied-saved-embeddings": ("tied", O, {"move": EMBEDDINGS[:1], "save_embeddings": True}),
    "tied-grown": ("tied", O, {"resize": 44, "save_embeddings": True}),
    "tied-embedding-to-save": ("tied", {**O, "modules_to_save": ["embed_tokens"]}, {}),
    "tied-head-to-save": ("tied", {**O, "modules_to_save": ["lm_head"]}, {}),
    "tied-both-to-save": ("tied", {**O, "modules_to_save": EMBEDDINGS}, {}),
    "tied-to-save-ensured": (
        "tied", {**O, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {},
    ),
    "tied-tokens": ("tied", {**O, "trainable_token_indices": [3, 39, 7]}, {}),
    "tied-tokens-apart": (
        "tied", {**O, "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [6, 2]}}, {},
    ),
    "tied-tokens-head": ("tied", {**O, "trainable_token_indices": {"lm_head": [6, 2]}}, {}),
    "tied-embedding": ("tied", {**O, "target_modules": ["embed_tokens", "o_proj"]}, {}),
    "tied-head": ("tied", {**O, "target_modules": ["lm_head", "o_proj"]}, {}),
    "tied-embedding-ensured": (
        "tied",
        {**O, "target_modules": ["embed_tokens", "o_proj"], "ensure_weight_tying": True},
        {},
    ),
    "phi-bias-all": ("phi", {**PHI, "bias": "all"}, {}),
    "phi-bias-lora-only": ("phi", {**PHI, "bias": "lora_only"}, {}),
    "phi-lora-bias": ("phi", {**PHI, "lora_bias": True}, {}),
    "phi-dora": ("phi", {**PHI, "use_dora": True, "modules_to_save": ["input_layernorm"]}, {}),
    "phi-head": ("phi", {**PHI, "target_modules": ["lm_head", "embed_tokens"]}, {}),
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    out = Path(sys.argv[1])
    only = sys.argv[2:]
    for name, make_model in MODELS.items():
        if (out / name).is_dir():
            continue
        torch.manual_seed(SEED)
        model = make_model().float().eval()
        with torch.no_grad():
            for key, tensor in model.named_parameters():
                if key.endswith("bias"):
                    tensor.copy_(0.2 * torch.randn_like(tensor))
        model.save_pretrained(out / name)
        (out / name / "generation_config.json").unlink(missing_ok=True)
    torch.manual_seed(SEED)
    ids = torch.randint(0, 37, (1, TOKENS))
    ids[0, :6] = torch.tensor([3, 5, 1, 6, 2, 7])
    file = out / "logits.safetensors"
    found = load_file(file) if file.exists() else {}
    found["input_ids"] = ids.to(torch.int32)
    for name in MODELS:
        found[name] = logits(base(out / name), ids)
    for name, (model_name, settings, special) in ADAPTERS.items():
        if not only or name in only:
            shutil.rmtree(out / name, ignore_errors=True)
            make(out / name, out / model_name, settings, **special)
            fresh = base(out / model_name)
            if "resize" in special:
                torch.manual_seed(SEED + 2)
                fresh.resize_token_embeddings(special["resize"], mean_resizing=False)
            found[name] = logits(PeftModel.from_pretrained(fresh, out / name), ids)
    save_file(found, file)
    for each in out.rglob("*.safetensors"):
        each.chmod(0o644)


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make(
    folder: Path,
    model_folder: Path,
    settings: dict[str, Any],
    *,
    move: list[str] = [],  # noqa: B006  base weights that are changed before, by their module
    resize: int | None = None,
    save_embeddings: bool = False,
    convert: bool = False,
) -> None:
    """Make and save an adapter all of whose trainable numbers are random."""
    torch.manual_seed(SEED + 1)
    plain = base(model_folder)
    with torch.no_grad():
        for key, tensor in plain.named_parameters():
            if key.split(".")[-2] in move:
                tensor.add_(0.3 * torch.randn_like(tensor))
    if resize is not None:
        plain.resize_token_embeddings(resize, mean_resizing=False)
    model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    if convert:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "start")
        model.peft_config["default"].init_lora_weights = settings["init_lora_weights"]
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if tensor.requires_grad:
                noise = torch.randn_like(tensor)
                tensor.mul_(1 + 0.3 * noise) if "magnitude" in key else tensor.add_(0.2 * noise)
    model.save_pretrained(
        folder,
        save_embedding_layers=True if save_embeddings else "auto",
        path_initial_model_for_weight_conversion=str(folder / "start") if convert else None,
    )
    shutil.rmtree(folder / "start", ignore_errors=True)
    (folder / "README.md").unlink(missing_ok=True)
    config_file = folder / "adapter_config.json"
    saved = json.loads(config_file.read_text())
    saved["base_model_name_or_path"] = None  # a path on this machine
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(saved[key], list):
            saved[key].sort()
    config_file.write_text(json.dumps(saved, indent=1) + "\n")


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float().contiguous()


if __name__ == "__main__":
    main()
