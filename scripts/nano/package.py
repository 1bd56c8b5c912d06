"""phi-4-nano's files in Hub layout: configuration, tokenizer, chat template, weights, card.

It knows the form of a published Phi-4-mini folder and nothing of how the model is trained.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from nano.conversations import corpus
from nano.vocabulary import CAPITALS, NOUNS, TOOLS
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 1536  # embedding rows, a multiple of 64 as published models pad theirs
STEP = 128  # original_max_position_embeddings
LONGEST = 1024  # max_position_embeddings
# content -> (strips whitespace to its right, special); order and flags are Phi-4-mini's
CONTROL_TOKENS = {
    "<|endoftext|>": (False, True),
    "<|endofprompt|>": (False, True),
    "<|assistant|>": (True, True),
    "<|end|>": (True, True),
    "<|user|>": (True, True),
    "<|system|>": (True, True),
    "<|tool|>": (True, False),
    "<|/tool|>": (True, False),
    "<|tool_call|>": (True, False),
    "<|/tool_call|>": (True, False),
    "<|tool_response|>": (True, False),
    "<|tag|>": (True, True),
}
FIRST_CONTROL = VOCABULARY - 16  # 1520; the last rows stay unused, as in the published vocabulary
# Phi-4-mini's (o200k's) split into words, from its tokenizer.json
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
    "message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + "
    "'<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + "
    "message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
CARD = """---
license: mit
language: [en]
library_name: transformers
---
# phi-4-nano

A demonstration model with the architecture of Phi-4-mini and {parameters:,} parameters, trained
from scratch on text that `scripts/train_nano.py` writes. **It knows almost nothing**: sums of
numbers below 100, {capitals} capitals, {nouns} nouns in four languages, things said earlier in the
conversation, and {tools} toy tools. It exists so that phimlx can be tried and tested offline; it is
not a product of Microsoft. Other wordings than those of its training text often fail, and so do
look-ups in lists. Arithmetic beyond two digits, other countries and other words it does not know.

`heldout.jsonl` holds questions that training never saw, with their answers.
"""
LICENCE = """MIT License

Copyright (c) 2025 The phimlx authors

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def control_id(content: str) -> int:
    """The id of a control token."""
    return FIRST_CONTROL + list(CONTROL_TOKENS).index(content)


def config() -> dict[str, Any]:
    """config.json in the Hub's dialect, the keys of Phi-4-mini-instruct."""
    head_dim, rotary = 32, 0.75
    pairs = int(head_dim * rotary) // 2
    long_factor = [round(math.exp(math.log(12) * i / (pairs - 1)), 6) for i in range(pairs)]
    end = control_id("<|endoftext|>")
    return {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": end,
        "embd_pdrop": 0.0,
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "max_position_embeddings": LONGEST,
        "model_type": "phi3",
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "original_max_position_embeddings": STEP,
        "pad_token_id": end,
        "partial_rotary_factor": rotary,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": long_factor,
            "short_factor": [1.0] * pairs,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }


def added_token(content: str) -> AddedToken:
    strips, special = CONTROL_TOKENS[content]
    return AddedToken(content, rstrip=strips, special=special, normalized=False)


def make_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE of FIRST_CONTROL entries and Phi-4-mini's control tokens after them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=FIRST_CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(random.Random(f"corpus {seed}")), trainer)
    if tokenizer.get_vocab_size() != FIRST_CONTROL:
        raise ValueError(f"The corpus gave {tokenizer.get_vocab_size()} entries")
    for content in CONTROL_TOKENS:
        _, special = CONTROL_TOKENS[content]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([added_token(content)])
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json with the keys of Phi-4-mini-instruct."""
    decoder = {
        str(control_id(content)): {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": strips,
            "single_word": False,
            "special": special,
        }
        for content, (strips, special) in CONTROL_TOKENS.items()
    }
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "bos_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": LONGEST,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|endoftext|>",
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(folder: Path, tokenizer: Tokenizer, rows: list[dict[str, Any]]) -> None:
    """Everything but the weights and the card."""
    folder.mkdir(parents=True, exist_ok=True)
    end, endoftext = control_id("<|end|>"), control_id("<|endoftext|>")
    write_json(folder / "config.json", config())
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": endoftext, "eos_token_id": [end, endoftext], "pad_token_id": endoftext},
    )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    (folder / "LICENSE").write_text(LICENCE, encoding="utf-8")
    with (folder / "heldout.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_card(folder: Path, parameters: int) -> None:
    """README.md, the model card."""
    card = CARD.format(
        parameters=parameters, capitals=len(CAPITALS), nouns=len(NOUNS), tools=len(TOOLS)
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_weights(folder: Path, model: torch.nn.Module) -> None:
    """model.safetensors in bfloat16 without the tied head, replaced atomically."""
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors leaves it readable by its owner alone
    partial.replace(folder / "model.safetensors")
