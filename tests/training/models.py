"""Tiny models to train, with a LongRoPE step at 32 tokens or none."""

from __future__ import annotations

import mlx.core as mx

from phimlx.models.phi3 import Phi3Config, Phi3ForCausalLM

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [float(i + 1) for i in range(8)],
    },
}


def tiny(tied: bool = True, seed: int = 0) -> Phi3ForCausalLM:
    """A model with random weights, frozen nowhere."""
    mx.random.seed(seed)
    model = Phi3ForCausalLM(Phi3Config.from_dict({**CONFIG, "tie_word_embeddings": tied}))
    mx.eval(model.parameters())
    return model
