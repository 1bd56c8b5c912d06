"""Losses and gradients of the tiny multimodal checkpoint's own adapters, by torch in float32.

    python scripts/goldens/mm_gradient_goldens.py DATA tests/goldens/mm-gradients.safetensors

DATA holds `tiny/tiny-phi4mm-remote`. Its weights go into transformers' port of the model, whose
projections get the adapters by a few lines of plain torch; that its logits are those that the
published code gave, `oracle.safetensors` says, is checked before anything is differentiated.
Ran with torch 2.13 and transformers 5.24, which phimlx itself never needs.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from phimlx.models.phi4mm.names import PATHS, TENSORS

SEED = 20301
EXACT = 2e-4  # largest difference from the published code's logits
ROWS = 2  # of each gradient that are kept beside its norm
CASES = {"image": "vision", "audio": "speech", "both": "vision"}  # and the adapter of each
WORDS = 12  # after the media, which are learned
RENAMED = {
    "input_image_embeds": "image_pixel_values",
    "image_sizes": "image_sizes",
    "image_attention_mask": "image_attention_mask",
    "input_audio_embeds": "audio_input_features",
    "audio_embed_sizes": "audio_embed_sizes",
}
PROJECTORS = {
    "image": ["image_embed.img_projection_up", "image_embed.img_projection_down"],
    "audio": ["audio_embed.up_proj_for_speech", "audio_embed.down_proj_for_speech"],
    "both": [
        "image_embed.img_projection_up",
        "image_embed.img_projection_down",
        "audio_embed.up_proj_for_vision_speech",
        "audio_embed.down_proj_for_vision_speech",
    ],
}


class Adapted(torch.nn.Module):
    """A projection with the checkpoint's adapters, of which one is on at a time."""

    def __init__(self, linear: torch.nn.Linear, scales: dict[str, float]) -> None:
        super().__init__()
        self.linear, self.scales, self.on = linear, scales, ""
        self.a, self.b = torch.nn.ParameterDict(), torch.nn.ParameterDict()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if not self.on:
            return y
        return y + self.scales[self.on] * (x @ self.a[self.on].T @ self.b[self.on].T)


def native_name(name: str) -> str:
    """Transformers' name of a tensor in the published layout."""
    for native, published in (*TENSORS.items(), *PATHS.items()):
        pattern = re.escape(published).replace(r"\#", r"(\d+)").replace("#", r"(\d+)")
        if match := re.match(rf"{pattern}(?=\.|$)", name):
            number = match[1] if match.lastindex else ""
            return native.replace("#", number) + name[match.end() :]
    return name


def native_config(config: dict[str, Any]) -> Phi4MultimodalConfig:
    audio = config["audio_processor"]["config"]
    rope = dict(config["rope_scaling"])
    text = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings original_max_position_embeddings "
        "rms_norm_eps tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    )
    return Phi4MultimodalConfig(
        **{key: config[key] for key in text.split()},
        sliding_window=None,
        rope_parameters={
            "rope_type": rope.pop("type"),
            "rope_theta": config["rope_theta"],
            "partial_rotary_factor": config["partial_rotary_factor"],
            "original_max_position_embeddings": config["original_max_position_embeddings"],
            **rope,
        },
        vision_config={
            **config["vision_config"],
            "crop_size": 448,
            "image_token_id": config["image_token_id"],
        },
        audio_config={
            "hidden_size": audio["attention_dim"],
            "intermediate_size": audio["linear_units"],
            "num_blocks": audio["num_blocks"],
            "num_attention_heads": audio["attention_heads"],
            "left_chunk": audio["left_chunk"],
            "ext_pw_out_channel": audio["attention_dim"],
            "depthwise_separable_out_channel": audio["attention_dim"],
            "kernel_size": audio["kernel_size"],
            "nemo_conv_channels": audio["nemo_conv_settings"]["conv_channels"],
            "bias_max_distance": audio["relative_attention_bias_args"]["t5_bias_max_distance"],
            "audio_token_id": config["audio_token_id"],
        },
        attn_implementation="eager",
    )


def build(folder: Path) -> tuple[Any, dict[str, Adapted]]:
    """The model and its adapted projections by their published path."""
    config = json.loads((folder / "config.json").read_text())
    model = Phi4MultimodalForCausalLM(native_config(config)).float().eval()
    for layer in model.model.embed_tokens_extend.image_embed.img_processor.encoder.layers:
        layer.self_attn.is_causal = False  # as in the original; the port's default is otherwise
    stored = load_file(folder / "model.safetensors")
    plain = {native_name(n): t for n, t in stored.items() if ".lora_" not in n}
    missing, unexpected = model.load_state_dict(plain, strict=False)
    left = [n for n in missing if not re.search(r"img_processor\.(head|post)|layers\.2|lm_head", n)]
    assert not left, left
    assert not unexpected, unexpected
    scales = {
        name: config[f"{name}_lora"]["lora_alpha"] / config[f"{name}_lora"]["r"]
        for name in ("vision", "speech")
    }
    adapted = {}
    for number, layer in enumerate(model.model.layers):
        for room, name in (
            ("self_attn", "qkv_proj"), ("self_attn", "o_proj"),
            ("mlp", "gate_up_proj"), ("mlp", "down_proj"),
        ):  # fmt: skip
            path = f"model.layers.{number}.{room}.{name}"
            made = Adapted(getattr(getattr(layer, room), name), scales)
            for kind in scales:
                made.a[kind] = torch.nn.Parameter(stored[f"{path}.lora_A.{kind}.weight"])
                made.b[kind] = torch.nn.Parameter(stored[f"{path}.lora_B.{kind}.weight"])
            setattr(getattr(layer, room), name, made)
            adapted[path] = made
    return model, adapted


def main(data: Path, out: Path) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    folder = data / "tiny" / "tiny-phi4mm-remote"
    model, adapted = build(folder)
    oracle = load_file(folder / "oracle.safetensors")
    kept: dict[str, torch.Tensor] = {}
    for case, adapter in CASES.items():
        for layer in adapted.values():
            layer.on = adapter
        given = {
            theirs: oracle[f"{case}.{ours}"]
            for ours, theirs in RENAMED.items()
            if f"{case}.{ours}" in oracle
        }
        ids = oracle[f"{case}.input_ids"]
        with torch.no_grad():
            logits = model(ids, **given).logits[0]
        apart = (logits - oracle[f"{case}.logits"]).abs().max().item()
        print(f"{case}: {apart:.1e} from the published code's logits")
        assert apart < EXACT
        words = torch.randint(2, 500, (1, WORDS))
        ids = torch.cat([ids, words], dim=1)
        supervised = torch.zeros(ids.shape[1], dtype=torch.bool)
        supervised[-WORDS + 1 :] = True
        supervised[-3] = False
        logits = model(ids, **given).logits[0]
        loss = functional.cross_entropy(logits[:-1][supervised[1:]], ids[0, 1:][supervised[1:]])
        model.zero_grad()
        loss.backward()
        kept[f"{case}.input_ids"] = ids[0].int()
        kept[f"{case}.supervised"] = supervised.to(torch.uint8)
        kept[f"{case}.loss"] = loss.detach().reshape(1)
        gradients = {}
        for path, layer in adapted.items():
            gradients[f"{path}.lora_A.{adapter}.weight"] = layer.a[adapter].grad
            gradients[f"{path}.lora_B.{adapter}.weight"] = layer.b[adapter].grad
        published = dict(PATHS)
        parameters = dict(model.named_parameters())
        for path in PROJECTORS[case]:
            native = f"model.embed_tokens_extend.{path}"
            for part in ("weight", "bias"):
                gradients[f"{published[native]}.{part}"] = parameters[f"{native}.{part}"].grad
        for name, gradient in gradients.items():
            kept[f"{case}.norm.{name}"] = gradient.norm().reshape(1)
            rows = gradient if gradient.dim() == 1 else gradient[:ROWS]
            kept[f"{case}.rows.{name}"] = rows.contiguous()
    save_file(kept, out)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
