"""Reference logits and greedy tokens, made by transformers in float32.

    python scripts/goldens/model_goldens.py tests/goldens/models     # tiny models, made here, all
    python scripts/goldens/model_goldens.py tests/goldens/models phi-3-window             # or some
    python scripts/goldens/model_goldens.py --nano phimlx/assets/nano

Each model gets a `reference.safetensors` that `phimlx.evaluation.parity` repeats. Needs torch and
transformers, which phimlx itself never does.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SEED = 20260
EXACT = 1e-4

# The published Phi-4-mini factors: the real ones, since made-up ones hide a wrong table.
LONG_FACTOR = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845,
    5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158,
    11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105,
    25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71,
    32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip

MINI = {
    "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256,
    "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75, "rope_theta": 10000.0, "sliding_window": 262144,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": LONG_FACTOR},
    "tie_word_embeddings": True,
}  # fmt: skip
# phi-4 in Llama's shape, as unsloth/phi-4 has it, and Phi-3 in Mistral's.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "num_hidden_layers": 2, "vocab_size": 128, "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384, "mlp_bias": False, "pretraining_tp": 1,
    "rope_theta": 250000.0, "rope_scaling": None, "tie_word_embeddings": False,
}  # fmt: skip
# What people put over phi-4's plain rope to reach further.
SCALINGS: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}
MODELS: dict[str, dict[str, Any]] = {
    "mini": {"config": MINI, "lengths": [64, 4096, 4097, 4160], "across": 4090},
    "mini-step-32": {
        "config": {**MINI, "original_max_position_embeddings": 32, "max_position_embeddings": 1024},
        "lengths": [1, 16, 31, 32, 33, 64, 200],
        "across": 20,
    },
    "phi-4": {
        "config": {
            "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256,
            "max_position_embeddings": 16384, "original_max_position_embeddings": 16384,
            "rope_theta": 250000.0, "rope_scaling": None, "sliding_window": None,
            "tie_word_embeddings": False,
        },
        "lengths": [1, 64, 1024, 8192],
        "across": 50,
    },
    # Phi-3's 4k models attend to 2047 tokens of 4096; here to 24 of 1024, across the step too.
    "phi-3-window": {
        "config": {
            "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
            "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 256,
            "max_position_embeddings": 1024, "original_max_position_embeddings": 1024,
            "rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 24,
            "tie_word_embeddings": False,
        },
        "lengths": [1, 23, 24, 25, 26, 64, 200],
        "across": 20,
    },
    "mini-window": {
        "config": {**MINI, "original_max_position_embeddings": 32, "max_position_embeddings": 1024,
                   "sliding_window": 24},
        "lengths": [16, 24, 25, 32, 33, 64],
        "across": 20,
    },
    "llama": {"config": LLAMA, "lengths": [1, 64, 300], "across": 20},
    "llama-tied": {
        "config": {**LLAMA, "tie_word_embeddings": True, "head_dim": 24, "rms_norm_eps": 1e-6},
        "lengths": [33],
        "across": 20,
    },
    **{
        f"llama-{name}": {
            "config": {
                **LLAMA, "max_position_embeddings": 64, "original_max_position_embeddings": 64,
                "num_hidden_layers": 3, "rope_theta": 10000.0, "rope_scaling": scaling,
            },
            "lengths": [40, 63, 64, 65, 200],
            "across": 50,
        }
        for name, scaling in SCALINGS.items()
    },
    "mistral-window": {
        "config": {
            **LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral",
            "max_position_embeddings": 1024, "rope_theta": 10000.0, "sliding_window": 24,
        },
        "lengths": [24, 25, 64],
        "across": 20,
    },
}  # fmt: skip
CHUNKS = {
    "mini": [1000],
    "mini-step-32": [1, 7, 64],
    "phi-4": [64, 1000],
    "phi-3-window": [1, 7, 30],
    "mini-window": [1, 7],
    "llama": [7],
    "llama-tied": [],
    "mistral-window": [7],
    **{f"llama-{name}": [7, 64] for name in SCALINGS},
}
MOST_CHUNKS = 70  # in one case
MOST_BATCHED = 4100  # tokens in one row of a batch


class Recorder:
    """Runs the reference and collects arrays and cases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays: dict[str, np.ndarray] = {}
        self.cases: list[dict[str, Any]] = []

    def store(self, name: str, array: np.ndarray) -> str:
        self.arrays[name] = np.ascontiguousarray(array)
        return name

    def case(self, name: str, run: str, dtype: str = "float32", bits: int | None = None,
             allowed: float = EXACT, **fields: Any) -> None:  # fmt: skip
        self.cases.append(
            {"name": name, "run": run, "dtype": dtype, "bits": bits, "allowed": allowed, **fields}
        )

    def save(self) -> None:
        save_file(
            self.arrays,
            self.folder / "reference.safetensors",
            metadata={"cases": json.dumps(self.cases)},
        )
        print(f"{self.folder}: {len(self.cases)} cases")


def make_model(folder: Path, config: dict[str, Any]) -> None:
    """A random model whose greedy text varies: weights far larger than at initialisation."""
    folder.mkdir(parents=True, exist_ok=True)
    hub = {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu",
        "attention_bias": False, "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(hub, indent=1) + "\n")
    torch.manual_seed(SEED)
    # A copy: transformers writes into the tables that it is given.
    made = AutoConfig.for_model(**copy.deepcopy({**hub, "torch_dtype": None}))
    model = AutoModelForCausalLM.from_config(made)
    for name, parameter in model.named_parameters():
        scale = 0.5 if "layernorm" in name or name.endswith("norm.weight") else 0.1
        noise = torch.randn_like(parameter) * scale
        parameter.data = (noise + ("norm" in name)).to(torch.bfloat16).float()
    weights = {
        name: mx.array(p.detach().numpy()).astype(mx.bfloat16)
        for name, p in model.named_parameters()
        if not (config["tie_word_embeddings"] and name.startswith("lm_head"))
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float32 `[positions, vocab]` of one pass over `ids` `[length]`."""
    hidden = model.model(torch.tensor(ids, dtype=torch.long)[None]).last_hidden_state
    return model.lm_head(hidden[0, positions]).float().numpy()


def watched(length: int) -> np.ndarray:
    """Positions whose logits are kept: spread over the whole, and the last ones."""
    return np.unique(
        np.concatenate([np.linspace(0, length - 1, 9), [max(0, length - 2)]]).astype(int)
    )


@torch.no_grad()
def record(recorder: Recorder, model: Any, draw: Any, lengths: list[int], chunks: list[int],
           across: int, new_tokens: int, step: int | None) -> None:  # fmt: skip
    """One pass, chunks, batches and greedy text in float32."""
    sequences = {length: draw(length) for length in lengths}
    for length, ids in sequences.items():
        side = "" if step is None else (" (short table)" if length <= step else " (long table)")
        positions = watched(length)
        where = {
            "input_ids": recorder.store(f"{length}.input_ids", ids.astype(np.int32)),
            "positions": recorder.store(f"{length}.positions", positions.astype(np.int32)),
            "logits": recorder.store(f"{length}.logits", logits(model, ids, positions)),
        }
        recorder.case(f"{length} tokens{side}", "pass", **where)
        for chunk in chunks:
            if chunk < length <= MOST_CHUNKS * chunk:
                name = f"{length} tokens{side}, chunks of {chunk}"
                recorder.case(name, "pass", chunk=chunk, **where)
    batched = {length: ids for length, ids in sequences.items() if length <= MOST_BATCHED}
    last = np.stack([logits(model, ids, np.array([len(ids) - 1]))[0] for ids in batched.values()])
    rows = [f"{length}.input_ids" for length in batched]
    where = {"rows": rows, "logits": recorder.store("batch.logits", last)}
    for side in ("left", "right"):
        recorder.case(f"batch of {len(rows)} lengths, padded {side}", "batch", side=side, **where)
    prompt = draw(across)
    generated = greedy(model, prompt, new_tokens)
    recorder.case(
        f"greedy, {across} + {new_tokens} tokens" + (", across the step" if step else ""),
        "generate",
        allowed=0.0,
        prompt=recorder.store("greedy.prompt", prompt.astype(np.int32)),
        tokens=recorder.store("greedy.tokens", generated.astype(np.int32)),
    )


def greedy(model: Any, prompt: np.ndarray, new_tokens: int) -> np.ndarray:
    out = model.generate(
        torch.tensor(prompt, dtype=torch.long)[None], max_new_tokens=new_tokens, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    return out[0, len(prompt) :].numpy()


@torch.no_grad()
def record_forms(recorder: Recorder, lengths: list[int]) -> None:
    """The same inputs in half precision and quantized.

    Half precision may differ from float32 by three times what the reference's own does. A quantized
    model is compared with the reference holding the same rounded weights; the device rounds them
    itself, so the allowance is wider than for arithmetic alone.
    """
    half = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    for dtype, torch_dtype in half.items():
        model = reference(recorder.folder, torch_dtype)
        for length in lengths:
            ids = recorder.arrays[f"{length}.input_ids"]
            positions = recorder.arrays[f"{length}.positions"]
            exact = recorder.arrays[f"{length}.logits"]
            found = logits(model, ids, positions)
            allowed = 3 * float(np.abs(found - exact).max() / np.abs(exact).max())
            recorder.case(
                f"{length} tokens, {dtype}", "pass", dtype=dtype, allowed=round(allowed, 5),
                input_ids=f"{length}.input_ids", positions=f"{length}.positions",
                logits=f"{length}.logits",
            )  # fmt: skip
    for bits in (8, 4):
        model = reference(recorder.folder)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                packed = mx.quantize(mx.array(parameter.numpy()), group_size=64, bits=bits)
                rounded = mx.dequantize(*packed, group_size=64, bits=bits)
                parameter.data = torch.tensor(np.array(rounded))
                assert parameter.shape[1] % 64 == 0, name
        for length in lengths:
            ids = recorder.arrays[f"{length}.input_ids"]
            positions = recorder.arrays[f"{length}.positions"]
            recorder.case(
                f"{length} tokens, {bits} bits", "pass", bits=bits, allowed=1e-2,
                input_ids=f"{length}.input_ids", positions=f"{length}.positions",
                logits=recorder.store(f"{length}.{bits}.logits", logits(model, ids, positions)),
            )  # fmt: skip


def tiny_models(root: Path, names: list[str]) -> None:
    for name, plan in ((name, MODELS[name]) for name in names or MODELS):
        folder = root / name
        make_model(folder, plan["config"])
        model = reference(folder)
        random = np.random.default_rng(SEED)
        vocabulary = plan["config"]["vocab_size"]

        def draw(length: int, vocabulary: int = vocabulary, random: Any = random) -> np.ndarray:
            return random.integers(4, vocabulary, length)

        step = plan["config"]["original_max_position_embeddings"] if "mini" in name else None
        recorder = Recorder(folder)
        record(recorder, model, draw, plan["lengths"], CHUNKS[name], plan["across"], 40, step)
        if name == "mini-step-32":
            record_forms(recorder, [16, 64])
        recorder.save()


def nano(folder: Path) -> None:
    """Goldens for the bundled model, from its own held-out text."""
    from tokenizers import Tokenizer

    config = json.loads((folder / "config.json").read_text())
    step = config["original_max_position_embeddings"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lines = (folder / "heldout.jsonl").read_text().splitlines()
    text = "".join(
        f"<|{message['role']}|>{message['content']}<|end|>"
        for line in lines
        for message in json.loads(line)["messages"]
    )
    stream = np.array(tokenizer.encode(text, add_special_tokens=False).ids)

    def draw(length: int) -> np.ndarray:
        return stream[:length]

    recorder = Recorder(folder)
    lengths = [step // 2, step, step + 1, 2 * step]
    record(recorder, reference(folder), draw, lengths, [7], step - 10, 30, step)
    record_forms(recorder, [step // 2, 2 * step])
    recorder.save()


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(2)
    if sys.argv[1] == "--nano":
        nano(Path(sys.argv[2]))
    else:
        tiny_models(Path(sys.argv[1]), sys.argv[2:])
