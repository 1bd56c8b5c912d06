"""Reference logits of adapters, made by PEFT and transformers in float32.

    python scripts/goldens/peft_goldens.py tests/goldens/peft         # make them
    python scripts/goldens/peft_goldens.py --check MODEL ADAPTER IDS  # logits of another folder

Needs torch, transformers and peft, which phimlx itself never does.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

SEED = 20261
TOKENS = 24

MODEL = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64,
    "max_position_embeddings": 128, "original_max_position_embeddings": 128,
    "rope_theta": 250000.0, "rope_scaling": None, "sliding_window": None,
    "tie_word_embeddings": False, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
ALL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6, "target_modules": ALL},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ALL},
    "dora": {
        "r": 3, "lora_alpha": 4, "use_dora": True, "target_modules": ["qkv_proj", "down_proj"],
        "layers_to_transform": [1, 2], "layers_pattern": "layers",
    },
    "patterns": {
        "r": 2, "lora_alpha": 3, "target_modules": ["qkv_proj", "o_proj"],
        "rank_pattern": {"layers.1.self_attn.o_proj": 5, "^model.layers.2.self_attn.qkv_proj": 1},
        "alpha_pattern": {"o_proj": 8},
    },
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "--check":
        check(*sys.argv[2:])
        return
    out = Path(sys.argv[1])
    torch.manual_seed(SEED)
    base = Phi3ForCausalLM(Phi3Config(**MODEL)).float().eval()
    base.save_pretrained(out / "model")
    (out / "model" / "generation_config.json").unlink(missing_ok=True)
    ids = torch.randint(3, MODEL["vocab_size"], (1, TOKENS))
    found = {"input_ids": ids.to(torch.int32), "base": logits(base, ids)}
    for name, settings in ADAPTERS.items():
        torch.manual_seed(SEED)
        plain = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
        config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.05, **settings)
        model = get_peft_model(plain, config).eval()
        with torch.no_grad():
            for key, tensor in model.named_parameters():
                if "lora_magnitude" in key:
                    tensor.mul_(1 + 0.3 * torch.randn_like(tensor))
                elif "lora_" in key:
                    tensor.copy_(0.2 * torch.randn_like(tensor))
        found[name] = logits(model, ids)
        shutil.rmtree(out / name, ignore_errors=True)
        model.save_pretrained(out / name)
        (out / name / "README.md").unlink()
        config_file = out / name / "adapter_config.json"
        saved = json.loads(config_file.read_text())
        saved["base_model_name_or_path"] = None  # a path on this machine
        saved["target_modules"] = sorted(saved["target_modules"])
        config_file.write_text(json.dumps(saved, indent=2) + "\n")
    save_file(found, out / "logits.safetensors")
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)


def check(model: str, adapter: str, ids: str) -> None:
    """Print the logits that PEFT makes of a folder, as JSON."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, adapter).eval()
    print(json.dumps(logits(adapted, torch.tensor([json.loads(ids)])).tolist()))


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float().contiguous()


if __name__ == "__main__":
    main()
