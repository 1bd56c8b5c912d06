"""Writes tests/goldens/rope.json: inverse frequencies of scaled rotary embeddings.

    python scripts/goldens/rope_goldens.py

What transformers' `ROPE_INIT_FUNCTIONS` make of configs, for lengths below and above the one that a
model was trained with. Ran with transformers 5.24 and torch 2.13; needs nothing of phimlx.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

OUTPUT = Path(__file__).parents[2] / "tests" / "goldens" / "rope.json"

# phi-4's own shape, one of small heads, and one of a small base.
SHAPES: list[dict[str, Any]] = [
    {"head_dim": 128, "rope_theta": 250000.0, "max_position_embeddings": 16384},
    {"head_dim": 16, "rope_theta": 10000.0, "max_position_embeddings": 64},
    {"head_dim": 96, "rope_theta": 500.0, "max_position_embeddings": 4096},
]
SCALINGS: list[dict[str, Any]] = [
    *({"rope_type": "linear", "factor": factor} for factor in (1.0, 2, 3.3, 4.0)),
    *({"rope_type": "dynamic", "factor": factor} for factor in (1.0, 2.0, 3.3, 8)),
    *({"rope_type": "yarn", "factor": factor} for factor in (1.0, 1.5, 4.0, 32)),
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.75},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2.5},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0, "beta_slow": None},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
]


def main() -> None:
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    cases = []
    for shape in SHAPES:
        for scaling in SCALINGS:
            most = shape["max_position_embeddings"]
            config = {
                "hidden_size": 4 * shape["head_dim"], "num_attention_heads": 4, **shape,
                "rope_scaling": scaling,
            }  # fmt: skip
            lengths = [None, most, most + 1, 2 * most + 7]
            for length in lengths if scaling["rope_type"] == "dynamic" else lengths[:1]:
                made = LlamaConfig(**json.loads(json.dumps(config)))
                frequencies, attention = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](
                    made, seq_len=None if length is None else torch.tensor(length)
                )
                found = frequencies.to(torch.float32).tolist()
                cases.append(
                    {
                        "config": config,
                        "length": length or 1,
                        "attention_factor": attention,
                        "inverse_frequencies": [float.hex(each) for each in found],
                    }
                )
    OUTPUT.write_text(
        "[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]\n"
    )
    print(len(cases), "cases")


if __name__ == "__main__":
    main()
