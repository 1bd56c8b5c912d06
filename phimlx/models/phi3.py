"""The phi3 architecture: phi-4, phi-4-reasoning, phi-4-mini, Phi-3 and Phi-3.5.

Fields carry the checkpoint's names. Source: transformers `models/phi3/modeling_phi3.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from phimlx.models.base import CausalLM, ForwardPass
from phimlx.models.config import ModelConfig, check_fixed, read_decoder
from phimlx.models.lora import project
from phimlx.models.rope import fuse, rotate

# Keys that change the model, with the only values that the family uses.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
}

Linear = Callable[[int, int], nn.Module]
"""Makes a projection without bias from its input and output dimensions."""


@dataclass(frozen=True)
class Phi3Config(ModelConfig):
    """Shape of a phi3 model."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        check_fixed(config, FIXED)
        return cls(**read_decoder(config, "rms_norm_eps"))

    @property
    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        heads = self.num_attention_heads
        hidden, intermediate = self.hidden_size, self.intermediate_size
        return {
            "self_attn.qkv_proj": (hidden, (heads + 2 * self.num_key_value_heads) * self.head_dim),
            "self_attn.o_proj": (heads * self.head_dim, hidden),
            "mlp.gate_up_proj": (hidden, 2 * intermediate),
            "mlp.down_proj": (intermediate, hidden),
        }

    @property
    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        queries, keys = (
            heads * self.head_dim for heads in (self.num_attention_heads, self.num_key_value_heads)
        )
        return {
            "self_attn.qkv_proj": (queries, keys, keys),
            "mlp.gate_up_proj": (self.intermediate_size, self.intermediate_size),
        }


def plain_linear(input_dims: int, output_dims: int) -> nn.Module:
    """Make a projection without adapters."""
    return nn.Linear(input_dims, output_dims, bias=False)


@fuse
def _gated(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


class Attention(nn.Module):
    """Grouped-query attention with the query, key and value projections in one matrix."""

    def __init__(self, config: Phi3Config, layer: int, linear: Linear = plain_linear) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        shapes = config.projection_shapes
        self.qkv_proj = linear(*shapes["self_attn.qkv_proj"])
        self.o_proj = linear(*shapes["self_attn.o_proj"])

    def __call__(self, x: mx.array, forward: ForwardPass) -> mx.array:
        batch, length, _ = x.shape
        qkv = project(self.qkv_proj, x, forward.routing)
        qkv = qkv.reshape(batch, length, -1, self.head_dim).transpose(0, 2, 1, 3)
        turning, values = mx.split(qkv, [self.heads + self.kv_heads], axis=1)
        queries, keys = mx.split(rotate(turning, *forward.rope), [self.heads], axis=1)
        # queries: [batch, heads, length, head_dim]; keys, values: [batch, kv_heads, …]
        queries = forward.wanted(queries, axis=2)
        out = forward.attend(self.layer, queries, keys, values)
        out = out.transpose(0, 2, 1, 3).flatten(2)
        return project(self.o_proj, out, forward.routing)


class MLP(nn.Module):
    def __init__(self, config: Phi3Config, linear: Linear = plain_linear) -> None:
        super().__init__()
        shapes = config.projection_shapes
        self.gate_up_proj = linear(*shapes["mlp.gate_up_proj"])
        self.down_proj = linear(*shapes["mlp.down_proj"])

    def __call__(self, x: mx.array, forward: ForwardPass) -> mx.array:
        gate, up = mx.split(project(self.gate_up_proj, x, forward.routing), 2, axis=-1)
        return project(self.down_proj, _gated(gate, up), forward.routing)


class DecoderLayer(nn.Module):
    def __init__(self, config: Phi3Config, layer: int, linear: Linear = plain_linear) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer, linear)
        self.mlp = MLP(config, linear)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def __call__(self, x: mx.array, forward: ForwardPass) -> mx.array:
        x = forward.wanted(x, axis=1) + self.self_attn(self.input_layernorm(x), forward)
        return x + self.mlp(self.post_attention_layernorm(x), forward)


class Phi3Model(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: Phi3Config, linear: Linear = plain_linear) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, i, linear) for i in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)


class Phi3ForCausalLM(CausalLM):
    """A phi3 language model."""

    model_type = "phi3"

    def __init__(self, config: Phi3Config) -> None:
        super().__init__()
        self.config = config
        self.model = Phi3Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
