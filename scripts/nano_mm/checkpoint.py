"""phi-4-nano-multimodal's configuration and weights, in the published layout and the native one.

One table of renames, read both ways; it knows nothing of training or of tokenizers.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

Tensors = dict[str, torch.Tensor]

IMAGE_TOKEN, AUDIO_TOKEN = "<|endoftext10|>", "<|endoftext11|>"
IMAGE_ID, AUDIO_ID = 1532, 1533  # rows that the text model's vocabulary leaves free
VISION = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,  # features leave before the last one, as published
    "num_attention_heads": 3,
    "patch_size": 14,
    "image_size": 448,
}
AUDIO = {"attention_dim": 96, "attention_heads": 4, "linear_units": 160, "num_blocks": 4}
CONV_CHANNELS = 32
ADAPTERS = {"vision": {"r": 32, "lora_alpha": 64}, "speech": {"r": 16, "lora_alpha": 32}}
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]

# (published, native): the names between which the two layouts differ
IMAGE, SOUND = "model.embed_tokens_extend.image_embed.", "model.embed_tokens_extend.audio_embed."
BLOCK = r"model\.embed_tokens_extend\.audio_embed\.encoder\.encoders\.\d+\."
RENAMES = (
    (BLOCK + r"feed_forward_(?:in|out)\.", "net.0.linear", "gate_up_proj"),
    (BLOCK + r"feed_forward_(?:in|out)\.", "net.2", "down_proj"),
    (BLOCK + r"self_attn\.", "linear_q", "q_proj"),
    (BLOCK + r"self_attn\.", "linear_k", "k_proj"),
    (BLOCK + r"self_attn\.", "linear_v", "v_proj"),
    (BLOCK + r"self_attn\.", "linear_out", "o_proj"),
    (re.escape(IMAGE), "img_projection.0", "img_projection_up"),
    (re.escape(IMAGE), "img_projection.2", "img_projection_down"),
    (re.escape(IMAGE), "glb_GN", "global_img_feature_extensor"),
    (re.escape(IMAGE), "sub_GN", "sub_img_feature_extensor"),
    (re.escape(SOUND), "audio_projection.speech.0", "up_proj_for_speech"),
    (re.escape(SOUND), "audio_projection.speech.2", "down_proj_for_speech"),
    (re.escape(SOUND), "audio_projection.vision.0", "up_proj_for_vision_speech"),
    (re.escape(SOUND), "audio_projection.vision.2", "down_proj_for_vision_speech"),
)
TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings",
    "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "pad_token_id", "sliding_window",
)  # fmt: skip
UNUSED = re.compile(r"img_processor\.(head|post_layernorm)\.|^lm_head\.")
PEFT_PREFIX = "base_model.model."


def rename(name: str, native: bool) -> str:
    """The native name of a published tensor, or the other way round."""
    for prefix, *pair in RENAMES:
        old, new = pair if native else reversed(pair)
        if match := re.match(f"({prefix}){re.escape(old)}(?=\\.|$)", name):
            return match[1] + new + name[match.end() :]
    return name


def published_config(text: dict[str, Any]) -> dict[str, Any]:
    """config.json in the published dialect, around the text model's own.

    The published code hard-codes the encoder's sizes and the two token ids; here they are told.
    """
    audio = {
        "activation": "swish",
        "activation_checkpointing": "",
        "batch_norm": False,
        "bias_in_glu": True,
        "causal": True,
        "chunk_size": -1,
        "cnn_layer_norm": True,
        "conv_activation": "swish",
        "conv_glu_type": "swish",
        "depthwise_multiplier": 1,
        "depthwise_seperable_out_channel": AUDIO["attention_dim"],
        "dropout_rate": 0.0,
        "encoder_embedding_config": {"input_size": 80},
        "ext_pw_kernel_size": 1,
        "ext_pw_out_channel": AUDIO["attention_dim"],
        "input_layer": "nemo_conv",
        "input_size": 80,
        "kernel_size": 3,
        "left_chunk": 18,
        "nemo_conv_settings": {"conv_channels": CONV_CHANNELS},
        "relative_attention_bias_args": {"t5_bias_max_distance": 500, "type": "t5"},
        "time_reduction": 8,
        **AUDIO,
    }
    layers = {
        "vision": r"layers.*((self_attn\.(qkv_proj|o_proj))|(mlp\.(gate_up|down)_proj))",
        "speech": r"((layers.*self_attn\.(qkv|o)_proj)|(layers.*mlp\.(gate_up|down)_proj))",
    }
    config = {key: value for key, value in text.items() if key != "sliding_window"}
    config |= {
        "architectures": ["Phi4MMForCausalLM"],
        "audio_processor": {"config": dict(sorted(audio.items())), "name": "cascades"},
        "audio_token_id": AUDIO_ID,
        "embd_layer": {
            "audio_embd_layer": {
                "compression_rate": 8,
                "downsample_rate": 1,
                "embedding_cls": "audio",
                "enable_gradient_checkpointing": False,
                "projection_cls": "mlp",
                "use_conv_downsample": False,
                "use_qformer": False,
            },
            "embedding_cls": "image_audio",
            "image_embd_layer": {
                "crop_size": 448,
                "embedding_cls": "tune_image",
                "enable_gradient_checkpointing": False,
                "hd_transform_order": "sub_glb",
                "image_token_compression_cls": "avg_pool_2d",
                "projection_cls": "mlp",
                "use_hd_transform": True,
                "with_learnable_separator": True,
            },
        },
        "image_token_id": IMAGE_ID,
        "model_type": "phi4mm",
        "sliding_window": 262144,
        "vision_config": VISION,
    }
    for name, sizes in ADAPTERS.items():
        config[f"{name}_lora"] = {"dp": 0.0, "layer": layers[name], **sizes}
    return dict(sorted(config.items()))


def native_config(config: dict[str, Any]) -> Phi4MultimodalConfig:
    """The published configuration as `transformers` takes it."""
    audio = config["audio_processor"]["config"]
    rope = config["rope_scaling"]
    return Phi4MultimodalConfig(
        **{key: config[key] for key in TEXT_KEYS},
        eos_token_id=config["eos_token_id"],
        rope_parameters={
            "rope_type": rope["type"],
            "rope_theta": config["rope_theta"],
            "partial_rotary_factor": config["partial_rotary_factor"],
            "short_factor": rope["short_factor"],
            "long_factor": rope["long_factor"],
            "original_max_position_embeddings": config["original_max_position_embeddings"],
        },
        vision_config={
            **config["vision_config"],
            "crop_size": config["embd_layer"]["image_embd_layer"]["crop_size"],
            "image_token_id": config["image_token_id"],
        },
        audio_config={
            "hidden_size": audio["attention_dim"],
            "intermediate_size": audio["linear_units"],
            "num_blocks": audio["num_blocks"],
            "num_attention_heads": audio["attention_heads"],
            "chunk_size": audio["chunk_size"],
            "left_chunk": audio["left_chunk"],
            "ext_pw_out_channel": audio["ext_pw_out_channel"],
            "depthwise_separable_out_channel": audio["depthwise_seperable_out_channel"],
            "depthwise_multiplier": audio["depthwise_multiplier"],
            "kernel_size": audio["kernel_size"],
            "input_size": audio["input_size"],
            "time_reduction": audio["time_reduction"],
            "nemo_conv_channels": audio["nemo_conv_settings"]["conv_channels"],
            "bias_max_distance": audio["relative_attention_bias_args"]["t5_bias_max_distance"],
            "downsample_rate": config["embd_layer"]["audio_embd_layer"]["downsample_rate"],
            "audio_token_id": config["audio_token_id"],
        },
    )


def build(config: dict[str, Any]) -> Any:
    """The native model with both adapters, float32, freshly initialised; its text base frozen."""
    model = Phi4MultimodalForCausalLM(native_config(config)).float()
    for layer in model.model.embed_tokens_extend.image_embed.img_processor.encoder.layers:
        # The port calls its encoder causal, and without a mask to say otherwise it then is;
        # the original's is not.
        layer.self_attn.is_causal = False
    adapted = None
    for name in ADAPTERS:
        lora = LoraConfig(
            r=config[f"{name}_lora"]["r"],
            lora_alpha=config[f"{name}_lora"]["lora_alpha"],
            target_modules=r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
        )
        if adapted is None:
            adapted = get_peft_model(model, lora, adapter_name=name)
        else:
            adapted.add_adapter(name, lora)
    return adapted


def load_tensors(model: Any, tensors: Tensors) -> None:
    """Published tensors into `build`'s model; what is unused in the published layout may lack.

    Raises ValueError for any other tensor that lacks or is left over.
    """
    named = {PEFT_PREFIX + rename(name, native=True): value for name, value in tensors.items()}
    missing, unexpected = model.load_state_dict(named, strict=False)
    missing = [name for name in missing if not UNUSED.search(name.removeprefix(PEFT_PREFIX))]
    if missing or unexpected:
        raise ValueError(f"Missing {missing}, left over {unexpected}")


def text_tensors(folder: Path) -> Tensors:
    """A text model's tensors under the names that they have beside adapters."""
    adapted = re.compile(rf"({'|'.join(TARGETS)})\.weight$")
    return {
        adapted.sub(r"\1.base_layer.weight", name): value
        for name, value in load_file(folder / "model.safetensors").items()
    }


def published_tensors(model: Any) -> Tensors:
    """The model's tensors under the published names, without those that are never used."""
    tensors = {}
    for name, value in model.state_dict().items():
        native = name.removeprefix(PEFT_PREFIX)
        if not UNUSED.search(native):
            tensors[rename(native, native=False)] = value.detach()
    return tensors


def save(folder: Path, tensors: Tensors) -> None:
    """model.safetensors in bfloat16, replaced atomically."""
    partial = folder / "model.safetensors.partial"
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in tensors.items()}
    save_file(dict(sorted(weights.items())), partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")


def load(folder: Path) -> Any:
    """The model of a published folder, float32, ready to answer."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = build(config).eval()
    tensors = load_file(folder / "model.safetensors")
    load_tensors(model, {name: value.float() for name, value in tensors.items()})
    return model
