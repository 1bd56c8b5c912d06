"""Reference logits of adapters of split projections, made by PEFT on LlamaForCausalLM in float32.

    python scripts/goldens/peft_split_goldens.py tests/goldens/models/llama tests/goldens/peft-split

Ran with torch 2.13, transformers 5.24 and peft 0.21, which phimlx itself never needs.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

SEED = 20262
QKV, MLP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 3, "lora_alpha": 5, "target_modules": [*QKV, "o_proj", *MLP, "down_proj"]},
    "some": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "patterns": {
        "r": 2, "lora_alpha": 3, "target_modules": [*QKV, *MLP], "use_rslora": True,
        "rank_pattern": {"k_proj": 4, "layers.1.self_attn.v_proj": 1},
        "alpha_pattern": {"gate_proj": 8, "q_proj": 1},
    },
    "dora": {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": [*QKV, *MLP]},
    "dora-some": {
        "r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["k_proj", "up_proj"],
    },
}  # fmt: skip


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    source, out = map(Path, sys.argv[1:])
    torch.manual_seed(SEED)
    ids = torch.randint(4, 128, (1, 24))
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    found = {"input_ids": ids.to(torch.int32), "base": base(ids).logits}
    for name, settings in ADAPTERS.items():
        torch.manual_seed(SEED)
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        for key, tensor in model.named_parameters():
            if "lora_magnitude" in key:
                tensor.mul_(1 + 0.3 * torch.randn_like(tensor))
            elif "lora_" in key:
                tensor.copy_(0.2 * torch.randn_like(tensor))
        found[name] = model(ids).logits
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


if __name__ == "__main__":
    main()
