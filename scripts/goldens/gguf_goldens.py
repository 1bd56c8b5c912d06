"""Make `tests/goldens/gguf`: packed blocks with their numbers, and tiny GGUF models with logits,
and a tokenizer of SentencePiece's with ids of texts.

Blocks are unpacked by the `gguf` package. The models are transformers'; their files are written by
the `gguf` package as llama.cpp's convert_hf_to_gguf.py does it (LlamaModel, Phi3MiniModel,
Phi2Model), in every type that the package can pack, and the logits are transformers' own, in
float32, with the weights that come back out of the packed ones.

The tokenizer is trained by sentencepiece as Llama's was, and listed as Phi3MiniModel.set_vocab
lists Phi-3's; the ids are sentencepiece's.

Run with torch 2.13, transformers 5.24, gguf 0.19 and sentencepiece 0.2.3:
    python scripts/goldens/gguf_goldens.py TEXT_TO_TRAIN_ON
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save_file

HERE = Path(__file__).parents[2] / "tests" / "goldens" / "gguf"
PACKED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# Where the float16 numbers stand in a block of the K-quants, which the package cannot pack.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
TYPES = (Type.Q8_0, Type.Q4_0, Type.F16, Type.Q5_1, Type.BF16, Type.Q4_1, Type.F32, Type.Q5_0)
HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, VOCAB, CONTEXT = 64, 2, 4, 2, 96, 320, 64
SHAPE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 257,
    "eos_token_id": 257,
    "pad_token_id": 257,
}


def main() -> None:
    HERE.mkdir(parents=True, exist_ok=True)
    save_file(blocks(), HERE / "blocks.safetensors")
    torch.manual_seed(0)
    logits = {}
    for name, make in (("llama", llama), ("phi3", phi3), ("phi2", phi2)):
        model, writer, tensors = make(HERE / f"{name}.gguf")
        write(writer, model, tensors)
        for length in (12, 40):
            ids = torch.randint(0, 256, (1, length))
            with torch.no_grad():
                logits[f"{name}.{length}.logits"] = model(ids).logits[0].numpy()
            logits[f"{name}.{length}.ids"] = ids[0].numpy().astype(np.int32)
    save_file(logits, HERE / "logits.safetensors")
    (HERE / "sentencepiece.json").write_text(json.dumps(pieces(Path(sys.argv[1]))) + "\n")


TEXTS = (
    "", " ", "  ", "a", " a", "a ", "Hello, world!", "  two  spaces  ", "\n", "a\nb\n\nc", "\t",
    "The king's horse, the queen's crown: 1234567890.", "don't SHOUT", "naïve Größe Ελληνικά",
    "日本語の文章 한국어 🏳️‍🌈", "e\u0301 \u200b\ufeff", "x" * 50, "▁ is an underline",
    "<s> </s> <unk>", "<0x0A>", "What light through yonder window breaks? It is the east.",
)  # fmt: skip


def pieces(text: Path) -> dict[str, list]:
    """Pieces with scores and types, and ids of texts."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.read_text("utf-8").split("\n\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    count = processor.vocab_size()
    types = []
    for index in range(count):
        kinds = {
            gguf.TokenType.UNKNOWN: processor.is_unknown,
            gguf.TokenType.CONTROL: processor.is_control,
            gguf.TokenType.BYTE: processor.is_byte,
        }
        types.append(next((kind for kind, is_it in kinds.items() if is_it(index)), 1))
    names = ("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>")
    return {
        "tokens": [*map(processor.id_to_piece, range(count)), *names, "<|user|>", "[PAD906]"],
        "scores": [*map(processor.get_score, range(count)), *[-1000.0] * 6, -10000.0],
        "types": [*map(int, types), *[3] * 6, 5],
        "texts": list(TEXTS),
        "ids": [processor.encode(text) for text in TEXTS],
    }


def blocks() -> dict[str, np.ndarray]:
    """Eight blocks of each type, as bytes and as numbers."""
    random = np.random.default_rng(7)
    found = {}
    for name in PACKED:
        kind = Type[name]
        size, nbytes = gguf.GGML_QUANT_SIZES[kind]
        if name in SCALES:
            packed = random.integers(0, 256, (8, nbytes), dtype=np.uint8)
            for place in SCALES[name]:
                scale = random.normal(0, 0.01, (8, 1)).astype(np.float16)
                packed[:, place : place + 2] = scale.view(np.uint8)
        else:
            numbers = random.normal(0, 0.02, (8, size)).astype(np.float32)
            packed = gguf.quants.quantize(numbers, kind)
        found[f"{name}.packed"] = packed
        found[f"{name}.numbers"] = gguf.quants.dequantize(packed, kind)
    return found


def write(
    writer: gguf.GGUFWriter, model: torch.nn.Module, tensors: dict[str, tuple[torch.Tensor, bool]]
) -> None:
    """Write a model whose weights become those that can be packed."""
    tokens = [*sorted(gguf_alphabet(), key=gguf_alphabet().get), "Ġt"]
    added = ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    types = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * len(added)
    padding = [f"[PAD{index}]" for index in range(len(types), VOCAB)]
    types += [gguf.TokenType.UNUSED] * len(padding)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *added, *padding])
    writer.add_token_types(types)
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(257)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    for number, (name, (tensor, permuted)) in enumerate(tensors.items()):
        kind = TYPES[number % len(TYPES)] if tensor.ndim > 1 else Type.F32
        packed = gguf.quants.quantize(tensor.detach().numpy(), kind)
        numbers = gguf.quants.dequantize(packed, kind).reshape(tensor.shape)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(numbers.copy()))
        if permuted:
            heads = HEADS if "attn_q" in name else KV_HEADS
            packed = gguf.quants.quantize(permute(tensor.detach().numpy(), heads), kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """As LlamaModel.permute."""
    shape = weights.shape
    return (
        weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    )


def gguf_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


def varied(model: torch.nn.Module) -> torch.nn.Module:
    """Norms and biases that are not 1 and 0, which a mistake would not show on."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    return model.eval()


def common(path: Path, architecture: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"Tiny {architecture}")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    return writer


def llama(path: Path) -> tuple[torch.nn.Module, gguf.GGUFWriter, dict]:
    config = transformers.LlamaConfig(
        **SHAPE, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5, rope_theta=250000.0
    )
    model = varied(transformers.LlamaForCausalLM(config))
    writer = common(path, "llama")
    writer.add_feed_forward_length(INNER)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(250000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCAB)
    tensors = {
        "output.weight": (model.lm_head.weight, False),
        "token_embd.weight": (model.model.embed_tokens.weight, False),
        "output_norm.weight": (model.model.norm.weight, False),
    }
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for name, module, permuted in (
            ("attn_norm", layer.input_layernorm, False),
            ("ffn_down", mlp.down_proj, False),
            ("ffn_gate", mlp.gate_proj, False),
            ("ffn_up", mlp.up_proj, False),
            ("ffn_norm", layer.post_attention_layernorm, False),
            ("attn_k", attention.k_proj, True),
            ("attn_output", attention.o_proj, False),
            ("attn_q", attention.q_proj, True),
            ("attn_v", attention.v_proj, False),
        ):
            tensors[f"blk.{number}.{name}.weight"] = (module.weight, permuted)
    return model, writer, tensors


def phi3(path: Path) -> tuple[torch.nn.Module, gguf.GGUFWriter, dict]:
    long = [1.0, 1.3, 1.9, 2.7, 4.4, 7.1]
    short = [1.0, 1.01, 1.02, 1.03, 1.04, 1.05]
    config = transformers.Phi3Config(
        **SHAPE,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        original_max_position_embeddings=16,
        partial_rotary_factor=0.75,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 16,
            "long_factor": long,
            "short_factor": short,
        },
    )
    model = varied(transformers.Phi3ForCausalLM(config))
    model.tie_weights()
    writer = common(path, "phi3")
    writer.add_rope_scaling_orig_ctx_len(16)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(12)
    writer.add_rope_freq_base(10000.0)
    writer.add_sliding_window(0)
    writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(CONTEXT / 16) / np.log(16))))
    tensors = {
        "rope_factors_long.weight": (torch.tensor(long), False),
        "rope_factors_short.weight": (torch.tensor(short), False),
        "token_embd.weight": (model.model.embed_tokens.weight, False),
        "output_norm.weight": (model.model.norm.weight, False),
    }
    for number, layer in enumerate(model.model.layers):
        for name, module in (
            ("attn_norm", layer.input_layernorm),
            ("ffn_down", layer.mlp.down_proj),
            ("ffn_up", layer.mlp.gate_up_proj),
            ("ffn_norm", layer.post_attention_layernorm),
            ("attn_output", layer.self_attn.o_proj),
            ("attn_qkv", layer.self_attn.qkv_proj),
        ):
            tensors[f"blk.{number}.{name}.weight"] = (module.weight, False)
    return model, writer, tensors


def phi2(path: Path) -> tuple[torch.nn.Module, gguf.GGUFWriter, dict]:
    """Queries, keys and values in one tensor, as files of phi-msft's checkpoints have them."""
    shape = {**SHAPE, "intermediate_size": 4 * HIDDEN}
    config = transformers.PhiConfig(
        **shape, num_key_value_heads=HEADS, layer_norm_eps=1e-5, partial_rotary_factor=0.5
    )
    model = varied(transformers.PhiForCausalLM(config))
    writer = common(path, "phi2")
    writer.add_feed_forward_length(4 * HIDDEN)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_add_bos_token(False)
    tensors: dict[str, tuple[torch.Tensor, bool]] = {}

    def add(name: str, module: torch.nn.Module) -> None:
        for kind, parameter in module.named_parameters():
            tensors[f"{name}.{kind}"] = (parameter, False)

    add("token_embd", model.model.embed_tokens)
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        fused = torch.nn.Linear(HIDDEN, 3 * HIDDEN)
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        for kind in ("weight", "bias"):
            data = torch.cat([getattr(part, kind).data for part in parts])
            getattr(fused, kind).data = data
            for part, rows in zip(parts, data.split(HIDDEN), strict=True):
                getattr(part, kind).data = rows  # a view, which follows what is packed
        add(f"blk.{number}.attn_norm", layer.input_layernorm)
        add(f"blk.{number}.attn_qkv", fused)
        add(f"blk.{number}.attn_output", attention.dense)
        add(f"blk.{number}.ffn_up", layer.mlp.fc1)
        add(f"blk.{number}.ffn_down", layer.mlp.fc2)
    add("output_norm", model.model.final_layernorm)
    add("output", model.lm_head)
    return model, writer, tensors


if __name__ == "__main__":
    main()
    for path in sorted(HERE.iterdir()):
        print(json.dumps({path.name: path.stat().st_size}))
