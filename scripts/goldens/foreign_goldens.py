"""Weights that other frameworks packed, and what their own libraries make of them.

    python scripts/goldens/foreign_goldens.py tests/goldens/foreign AUTOAWQ

Made with torch 2.13, transformers 5.24, bitsandbytes 0.50.2, compressed-tensors 0.20.1, GPTQModel
7.7.0 and the source of AutoAWQ 0.2.9 (AUTOAWQ: its unpacked folder, of which two files are run
that need no GPU). phimlx itself never needs any of them.

`packed.safetensors` holds layers as they are stored, `weights.safetensors` what the library
decodes them to, `cases.json` the `quantization_config` of each. The folders are whole tiny models,
each with `expected.safetensors`: the decoded weights and, where transformers runs them on a CPU,
its logits in float32.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.backends.default import ops as default_ops
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gptqmodel.nn_modules.qlinear import PackableQuantLinear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

SEED = 20262
FP8 = torch.float8_e4m3fn
Case = tuple[str, dict[str, Any], dict[str, torch.Tensor], torch.Tensor]

MODEL = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 48,
    "max_position_embeddings": 128, "original_max_position_embeddings": 128,
    "rope_theta": 10000.0, "rope_scaling": None, "sliding_window": None,
    "tie_word_embeddings": False, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
PHI = {
    "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 2,
    "vocab_size": 48, "max_position_embeddings": 128, "partial_rotary_factor": 0.5,
    "eos_token_id": 2, "bos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    out = Path(sys.argv[1])
    stub_awq(Path(sys.argv[2]))
    out.mkdir(parents=True, exist_ok=True)
    packed, weights, settings = {}, {}, {}
    for makers in (awq, awq_gemv, gptq, bitsandbytes, compressed, fp8):
        for name, config, parts, weight in makers():
            settings[name] = config
            weights[name] = weight.contiguous()
            packed |= {f"{name}.{part}": array.contiguous() for part, array in parts.items()}
    save_file(packed, out / "packed.safetensors")
    save_file(weights, out / "weights.safetensors")
    (out / "cases.json").write_text(json.dumps(settings, indent=1) + "\n")
    for folder in (folder for folder in out.iterdir() if folder.is_dir()):
        shutil.rmtree(folder)
    bitsandbytes_folders(out)
    compressed_folder(out / "compressed-int4")
    fp8_folder(out / "fp8")
    gptq_folder(out / "gptq-phi")
    awq_folder(out / "awq")


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def stub_awq(folder: Path) -> None:
    """Make the package `awq` of its folders alone: its `__init__` needs an older transformers."""
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        module = types.ModuleType(name)
        module.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = module


def awq() -> Iterator[Case]:
    dequantize = import_module("awq.utils.packing_utils").dequantize_gemm
    for name, rows, width, group in (("awq", 48, 64, 32), ("awq-one-group", 40, 96, 96)):
        parts = {
            "qweight": words(width, rows // 8),
            "qzeros": words(width // group, rows // 8),
            "scales": (torch.rand(width // group, rows) / 50).half(),
        }
        weight = dequantize(parts["qweight"], parts["qzeros"], parts["scales"], 4, group)
        config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
        yield name, config, parts, weight.T


def awq_gemv() -> Iterator[Case]:
    pack = import_module("awq.modules.linear.gemv").WQLinear_GEMV.from_linear
    rows, width, group = 24, 128, 64
    linear = torch.nn.Linear(width, rows, bias=False).half()
    scales = (torch.rand(rows, width // group) / 50 + 0.01).half()
    zeros = torch.randint(0, 16, (rows, width // group))
    numbers = torch.randint(0, 16, (rows, width))
    spread = zeros.repeat_interleave(group, 1), scales.repeat_interleave(group, 1)
    linear.weight.data = (numbers - spread[0]) * spread[1]
    layer = pack(linear, 4, group, scales=scales, zeros=zeros)
    parts = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemv"}
    yield "awq-gemv", config, parts, linear.weight.data


def gptq() -> Iterator[Case]:
    rows, width = 32, 96
    for bits in (2, 3, 4, 8):
        for version in ("gptq", "gptq_v2"):
            for act_order in (False, True):
                parts = gptq_layer(rows, width, bits, 32, act_order)
                config = {
                    "quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": act_order,
                    "sym": False, "checkpoint_format": version,
                }  # fmt: skip
                if not act_order:
                    del parts["g_idx"]  # which some files lack
                weight = gptq_weight(parts, rows, width, bits, 32, version)
                name = f"gptq-{bits}-{version}" + ("-act" if act_order else "")
                yield name, config, parts, weight


def gptq_layer(
    rows: int, width: int, bits: int, group: int, act_order: bool
) -> dict[str, torch.Tensor]:
    groups = width // group
    index = torch.arange(width) // group
    return {
        "qweight": words(width * bits // 32, rows),
        "qzeros": words(groups, rows * bits // 32),
        "scales": (torch.rand(groups, rows) / 50).half(),
        "g_idx": (index[torch.randperm(width)] if act_order else index).int(),
    }


def gptq_weight(
    parts: dict[str, torch.Tensor], rows: int, width: int, bits: int, group: int, version: str
) -> torch.Tensor:
    layer = TorchLinear(
        bits=bits, group_size=group, sym=False, desc_act=True, in_features=width,
        out_features=rows, bias=False,
    )  # fmt: skip
    for name, array in parts.items():
        getattr(layer, name).data.copy_(array)
    if version == "gptq":
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    layer._init_wf_unsqueeze_buffers()
    return PackableQuantLinear.dequantize_weight(layer).T


def bitsandbytes() -> Iterator[Case]:
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for block in (64, 128):
                for dtype in (torch.bfloat16, torch.float16, torch.float32):
                    shape = (24, 128) if block == 64 else (72, 80)
                    weight = torch.randn(shape).to(dtype) * 0.1
                    data, state = bnb.quantize_4bit(
                        weight, blocksize=block, compress_statistics=nested, quant_type=kind
                    )
                    state_parts = state.as_dict(packed=True)
                    parts = {"weight": data, **{f"weight.{k}": v for k, v in state_parts.items()}}
                    decoded = dequantize_4bit(data, state)
                    exact = str(dtype).removeprefix("torch.")
                    name = f"bnb-{kind}-{block}-{exact}" + ("-nested" if nested else "")
                    config = {
                        "quant_method": "bitsandbytes", "load_in_4bit": True,
                        "bnb_4bit_quant_type": kind,
                    }  # fmt: skip
                    yield name, config, parts, decoded
    # Numbers of 16 bits that hold four of 4 bits, as for FSDP.
    data, state = bnb.quantize_4bit(
        torch.randn(24, 128).bfloat16(),
        blocksize=64,
        quant_storage=torch.bfloat16,
        quant_type="nf4",
    )
    parts = {"weight": data, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    yield "bnb-nf4-stored-wide", config, parts, bnb.dequantize_4bit(data, state)
    data, scales, _ = bnb.int8_vectorwise_quant(torch.randn(24, 64).half())
    parts = {"weight": data, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    yield "bnb-int8", config, parts, bnb.int8_vectorwise_dequant(data, scales)


def dequantize_4bit(data: torch.Tensor, state: Any) -> torch.Tensor:
    """Decode by bitsandbytes' code for every device; its CPU's agrees where blocks divide rows.

    Where they do not it takes other scales than those that the blocks were quantized with.
    """
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    code = bnb.get_4bit_type(state.quant_type, device="cpu")
    settings = (state.blocksize, state.shape, state.dtype)
    decoded = default_ops._dequantize_4bit_compute(data.reshape(-1), scales, code, *settings)
    if state.shape[1] % state.blocksize == 0:
        assert torch.equal(decoded, bnb.dequantize_4bit(data, state))
    return decoded


SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4-group": ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group"}),
    "int4-zeros": (
        "pack-quantized",
        {"num_bits": 4, "group_size": 16, "strategy": "group", "symmetric": False},
    ),
    "int4-channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "int3-zeros": (
        "pack-quantized",
        {"num_bits": 3, "group_size": 32, "strategy": "group", "symmetric": False},
    ),
    "int8-packed": ("pack-quantized", {"num_bits": 8, "group_size": 32, "strategy": "group"}),
    "int8-channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8-zeros": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "int8-tensor": ("naive-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "int8-naive-group": (
        "naive-quantized",
        {"num_bits": 8, "group_size": 32, "strategy": "group", "symmetric": False},
    ),
    "fp8-channel": ("float-quantized", {"num_bits": 8, "strategy": "channel", "type": "float"}),
    "fp8-tensor": ("naive-quantized", {"num_bits": 8, "strategy": "tensor", "type": "float"}),
    "fp8-block": (
        "float-quantized",
        {"num_bits": 8, "strategy": "block", "type": "float", "block_structure": [16, 32]},
    ),
}


def compressed() -> Iterator[Case]:
    for name, (format, args) in SCHEMES.items():
        for dtype in (torch.bfloat16, torch.float32):
            rows, width = (40, 96) if "block" not in name else (40, 80)
            weight = (torch.randn(rows, width) * 0.1).to(dtype)
            parts, decoded, scheme = compress(weight, format, args)
            config = {
                "quant_method": "compressed-tensors", "format": format,
                "config_groups": {"group_0": scheme}, "ignore": ["lm_head"],
            }  # fmt: skip
            short = str(dtype).removeprefix("torch.")
            yield f"ct-{name}-{short}", config, parts, decoded
    # As before version 0.15, which kept the order of activations: a group for each column.
    parts, _, scheme = compress(torch.randn(24, 64).bfloat16(), *SCHEMES["int4-zeros"])
    index = (torch.arange(64) // 16)[torch.randperm(64)]
    parts["weight_g_idx"] = index.int()
    numbers = nibbles(parts["weight_packed"]) - nibbles(parts["weight_zero_point"].T).T[:, index]
    decoded = numbers.bfloat16() * parts["weight_scale"][:, index]
    config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": scheme},
    }  # fmt: skip
    yield "ct-int4-g-idx", config, parts, decoded
    # As before version 0.13 where 32 / bits is no whole number: ten numbers of 3 bits a word.
    parts, decoded, scheme = compress(torch.randn(24, 64).bfloat16(), *SCHEMES["int3-zeros"])
    numbers = unpack_from_int32(parts["weight_packed"], 3, torch.Size((24, 64))) + 4
    zeros = unpack_from_int32(parts["weight_zero_point"], 3, torch.Size((24, 2)), packed_dim=0) + 4
    parts["weight_packed"], parts["weight_zero_point"] = loose(numbers), loose(zeros.T).T
    config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": scheme},
    }  # fmt: skip
    yield "ct-int3-loose", config, parts, decoded


def loose(numbers: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[1] % 10))
    fields = padded.unflatten(1, (-1, 10)) << (3 * torch.arange(10))
    return fields.sum(-1).to(torch.int32)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(0, 32, 4)
    return ((packed[..., None].long() >> shifts) & 15).flatten(-2)


def compress(
    weight: torch.Tensor, format: str, settings: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]:
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    scale, zero = grid(weight, args)
    parts = {"weight": weight, "weight_scale": scale}
    if not args.symmetric:
        parts["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(format)
    packed = compressor.compress(parts, scheme)
    decoded = compressor.decompress(packed, scheme)["weight"]
    return packed, decoded, json.loads(scheme.model_dump_json())


def grid(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points that fit a weight, in the shape of its strategy."""
    rows, width = weight.shape
    if args.strategy == "tensor":
        groups = weight.reshape(1, -1)
    elif args.strategy == "channel":
        groups = weight[:, None]
    elif args.strategy == "group":
        groups = weight.reshape(rows, -1, args.group_size)
    else:
        high, wide = args.block_structure
        down, across = math.ceil(rows / high), math.ceil(width / wide)
        padded = torch.zeros(down * high, across * wide, dtype=weight.dtype)
        padded[:rows, :width] = weight
        groups = padded.reshape(down, high, across, wide).transpose(1, 2).flatten(2)
    low, top = groups.amin(-1).float(), groups.amax(-1).float()
    largest = 448 if args.type == "float" else 2 ** (args.num_bits - 1) - 1
    if args.symmetric:
        scale = torch.maximum(-low, top) / largest
        return scale.to(weight.dtype), torch.zeros_like(scale, dtype=torch.int8)
    scale = (top - low) / (2**args.num_bits - 1)
    zero = torch.round(-(2 ** (args.num_bits - 1)) - low / scale)
    bound = 2 ** (args.num_bits - 1)
    return scale.to(weight.dtype), zero.clamp(-bound, bound - 1).to(torch.int8)


def fp8() -> Iterator[Case]:
    dequantize = Fp8Dequantize(None)._dequantize_one
    every = torch.arange(256, dtype=torch.uint8).view(FP8).reshape(16, 16)
    one = torch.ones(1, 1)
    config: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    yield "fp8-every-byte", config, {"weight": every, "weight_scale_inv": one}, every.float()
    for dtype in (torch.float32, torch.bfloat16):
        parts = fp8_parts(torch.randn(256, 128) * 0.1, dtype)
        decoded = dequantize(parts["weight"], parts["weight_scale_inv"], torch.float32)
        yield f"fp8-{str(dtype)[6:]}", config, parts, decoded
    # Blocks at the edges are smaller; transformers' kernels mask them.
    parts = fp8_parts(torch.randn(40, 144) * 0.1, torch.float32)
    decoded = parts["weight"].float() * parts["weight_scale_inv"].repeat_interleave(128, 1)[:, :144]
    yield "fp8-edges", config, parts, decoded
    parts = {"weight": every.clone(), "weight_scale_inv": torch.tensor([[120]], dtype=torch.uint8)}
    config = {**config, "scale_fmt": "ue8m0"}
    yield "fp8-exponents", config, parts, dequantize(parts["weight"], parts["weight_scale_inv"])
    parts = {"weight": every.clone(), "weight_scale": torch.tensor([0.37])}  # AutoFP8's
    static = {"quant_method": "fp8", "activation_scheme": "static"}
    yield "fp8-auto", static, parts, every.float() * 0.37
    weight = torch.randn(24, 64)
    scale = weight.abs().amax(1, keepdim=True) / 448
    parts = {"weight": (weight / scale).to(FP8), "weight_scale": scale}
    decoded = parts["weight"].float() * scale
    yield "fbgemm", {"quant_method": "fbgemm_fp8"}, parts, decoded


def fp8_parts(weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    rows, width = weight.shape
    scale = torch.zeros(math.ceil(rows / 128), math.ceil(width / 128))
    data = torch.zeros(rows, width, dtype=FP8)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            place = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            scale[row, column] = weight[place].abs().max() / 448
            data[place] = (weight[place] / scale[row, column].to(dtype).float()).to(FP8)
    return {"weight": data, "weight_scale_inv": scale.to(dtype)}


# Whole models


def plain_model(folder: Path, dtype: torch.dtype, **other: Any) -> PreTrainedModel:
    model = Phi3ForCausalLM(Phi3Config(**{**MODEL, **other})).to(dtype).eval()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return model


def finish(folder: Path, weights: dict[str, torch.Tensor], model: Any = None) -> None:
    """Write what phimlx is to find; logits of `model`, or none."""
    found = {f"weight.{name}": array.contiguous() for name, array in weights.items()}
    if model is not None:
        ids = torch.randint(3, 48, (1, 20))
        with torch.no_grad():
            found["logits"] = model(ids).logits[0].float()
        found["input_ids"] = ids.int()
    save_file(found, folder / "expected.safetensors")
    for extra in ("generation_config.json", "README.md"):
        (folder / extra).unlink(missing_ok=True)


def in_float32(folder: Path, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """transformers' own model over the decoded weights, for logits."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.load_state_dict({name: array.float() for name, array in weights.items()})
    return model


def bitsandbytes_folders(out: Path) -> None:
    for name, config in {
        "bitsandbytes-nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        "bitsandbytes-int8": BitsAndBytesConfig(load_in_8bit=True),
        "bitsandbytes-llama": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="fp4",
            llm_int8_skip_modules=["lm_head", "o_proj", "model.layers.1.mlp"],
        ),
    }.items():  # fmt: skip
        plain = out / "plain"
        if name == "bitsandbytes-llama":  # as Unsloth publishes phi-4
            sizes = {key: value for key, value in MODEL.items() if not key.startswith("original")}
            LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16().save_pretrained(plain)
        else:
            plain_model(plain, torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(out / name)
        again = AutoModelForCausalLM.from_pretrained(out / name, device_map="cpu")
        dequantized = again.dequantize()
        weights = {key: array.to(torch.bfloat16) for key, array in dequantized.state_dict().items()}
        finish(out / name, weights, in_float32(out / name, weights))
        shutil.rmtree(plain)


def compressed_folder(folder: Path) -> None:
    plain_model(folder, torch.bfloat16)
    weights = load_file(folder / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    scheme: dict[str, Any] = {}
    for name, array in weights.items():
        path = name.removesuffix(".weight")
        if name.endswith("proj.weight"):
            parts, _, scheme = compress(array, *SCHEMES["int4-zeros"])
            stored |= {f"{path}.{part}": each for part, each in parts.items()}
        else:
            stored[name] = array
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    settings = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }  # fmt: skip
    add_to_config(folder, settings)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.bfloat16
    )
    finish(folder, model.state_dict(), in_float32(folder, model.state_dict()))


def fp8_folder(folder: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    plain_model(folder, torch.bfloat16, **sizes)
    weights = load_file(folder / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, array in weights.items():
        if name.endswith("proj.weight"):
            parts = fp8_parts(array.float(), torch.float32)
            path = name.removesuffix(".weight")
            stored |= {f"{path}.{part}": each for part, each in parts.items()}
        else:
            stored[name] = array
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    settings = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    add_to_config(folder, settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    weights = model.state_dict()
    finish(folder, weights, model.float())


def gptq_folder(folder: Path) -> None:
    """phi-2's shape, whose layers have biases, with AutoGPTQ's older file of settings."""
    model = PhiForCausalLM(PhiConfig(**PHI)).half().eval()
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, array in weights.items():
        path, _, kind = name.rpartition(".")
        if kind == "weight" and path.split(".")[-1] in (
            "q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2",
        ):  # fmt: skip
            rows, width = array.shape
            parts = gptq_layer(rows, width, 4, 32, act_order=True)
            stored |= {f"{path}.{part}": each for part, each in parts.items()}
            weights[name] = gptq_weight(parts, rows, width, 4, 32, "gptq")
        else:
            stored[name] = array
    (folder / "model.safetensors").unlink()
    save_file(stored, folder / "gptq_model-4bit-32g.safetensors", {"format": "pt"})
    settings = {"bits": 4, "group_size": 32, "desc_act": True, "sym": False}
    (folder / "quantize_config.json").write_text(json.dumps(settings) + "\n")
    model.load_state_dict(weights)
    finish(folder, weights, model.float())


def awq_folder(folder: Path) -> None:
    plain_model(folder, torch.float16)
    dequantize = import_module("awq.utils.packing_utils").dequantize_gemm
    weights = load_file(folder / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, array in weights.items():
        if name.endswith(("qkv_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight")):
            rows, width = array.shape
            parts = {
                "qweight": words(width, rows // 8),
                "qzeros": words(width // 32, rows // 8),
                "scales": (torch.rand(width // 32, rows) / 50).half(),
            }
            path = name.removesuffix(".weight")
            stored |= {f"{path}.{part}": each for part, each in parts.items()}
            weights[name] = dequantize(*parts.values(), 4, 32).T
        else:
            stored[name] = array
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    settings = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": ["o_proj"],
    }  # fmt: skip
    add_to_config(folder, settings)
    finish(folder, weights, in_float32(folder, weights))


def add_to_config(folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()
