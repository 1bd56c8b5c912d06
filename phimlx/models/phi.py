"""The phi architecture: phi-1, phi-1.5 and phi-2.

Fields carry the checkpoint's names. Source: transformers `models/phi/modeling_phi.py`; the older
layouts: `modeling_phi.py` and `modeling_mixformer_sequential.py` of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from phimlx.errors import ConfigError, shortened
from phimlx.models.base import CausalLM, ForwardPass
from phimlx.models.config import ModelConfig, check_fixed, read_decoder
from phimlx.models.lora import project
from phimlx.models.names import Renames
from phimlx.models.rope import rotate

# Keys that change the model, with the only values that the family uses.
FIXED: dict[str, tuple[Any, ...]] = {"hidden_act": ("gelu_new",), "tie_word_embeddings": (False,)}

PARTIAL_ROTARY_FACTOR = 0.5  # where the config says nothing, as in transformers


@dataclass(frozen=True)
class PhiConfig(ModelConfig):
    """Shape of a phi model.

    Attributes:
        qk_layernorm: whether queries and keys are normed, head by head, before they turn.
    """

    qk_layernorm: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        check_fixed(config, FIXED)
        normed = config.get("qk_layernorm", False)
        if not isinstance(normed, bool):
            raise ConfigError(
                f"config.json: qk_layernorm is {shortened(normed)}, not true or false."
            )
        decoder = read_decoder(config, "layer_norm_eps", PARTIAL_ROTARY_FACTOR)
        return cls(**decoder, qk_layernorm=normed)

    @property
    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        hidden, intermediate = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (hidden, queries),
            "self_attn.k_proj": (hidden, keys),
            "self_attn.v_proj": (hidden, keys),
            "self_attn.dense": (queries, hidden),
            "mlp.fc1": (hidden, intermediate),
            "mlp.fc2": (intermediate, hidden),
        }


class Attention(nn.Module):
    """Grouped-query attention whose heads turn in part."""

    def __init__(self, config: PhiConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        for name in ("q_proj", "k_proj", "v_proj", "dense"):
            self[name] = nn.Linear(*config.projection_shapes[f"self_attn.{name}"])
        self.qk_layernorm = config.qk_layernorm
        if config.qk_layernorm:
            self.q_layernorm = nn.LayerNorm(config.head_dim, eps=config.norm_eps)
            self.k_layernorm = nn.LayerNorm(config.head_dim, eps=config.norm_eps)

    def __call__(self, x: mx.array, forward: ForwardPass) -> mx.array:
        batch, length, _ = x.shape

        def heads(rows: mx.array) -> mx.array:  # [batch, length, heads, head_dim]
            return rows.reshape(batch, length, -1, self.head_dim)

        routing = forward.routing
        queries = heads(project(self.q_proj, x, routing))
        keys = heads(project(self.k_proj, x, routing))
        if self.qk_layernorm:
            queries, keys = self.q_layernorm(queries), self.k_layernorm(keys)
        queries = forward.wanted(rotate(queries.transpose(0, 2, 1, 3), *forward.rope), axis=2)
        keys = rotate(keys.transpose(0, 2, 1, 3), *forward.rope)
        values = heads(project(self.v_proj, x, routing)).transpose(0, 2, 1, 3)
        if x.dtype == mx.float16:  # whose range phi-2's scores leave
            queries = queries.astype(mx.float32)
        out = forward.attend(self.layer, queries, keys, values)
        out = out.transpose(0, 2, 1, 3).flatten(2).astype(x.dtype)
        return project(self.dense, out, routing)


class MLP(nn.Module):
    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(*config.projection_shapes["mlp.fc1"])
        self.fc2 = nn.Linear(*config.projection_shapes["mlp.fc2"])

    def __call__(self, x: mx.array, forward: ForwardPass) -> mx.array:
        inner = nn.gelu_approx(project(self.fc1, x, forward.routing))
        return project(self.fc2, inner, forward.routing)


class DecoderLayer(nn.Module):
    """Attention and MLP side by side, on what one norm gives both."""

    def __init__(self, config: PhiConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, forward: ForwardPass) -> mx.array:
        normed = self.input_layernorm(x)
        attended = self.self_attn(normed, forward)
        x, normed = forward.wanted(x, axis=1), forward.wanted(normed, axis=1)
        return x + attended + self.mlp(normed, forward)


class PhiModel(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class PhiForCausalLM(CausalLM):
    """A phi language model."""

    model_type = "phi"

    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        self.config = config
        self.model = PhiModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def norm(self, x: mx.array) -> mx.array:
        return self.model.final_layernorm(x)


# The settings of the older layouts, under today's names.
_SETTINGS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "activation_function": "hidden_act",
}
# Settings that say how it was computed, not what.
_IMMATERIAL = ("flash_attn", "flash_rotary", "fused_dense", "img_processor", "auto_map")

ROTARY_DIM = 32  # where the config says nothing

VOCABULARY_MULTIPLE = 64  # to which the older code rounds the vocabulary up


def older_config(
    config: Mapping[str, Any], adapters: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Write a `phi-msft` or `mixformer-sequential` config under today's names.

    Raises:
        ConfigError: where a value that others follow from is missing or impossible.
    """
    own = {
        _SETTINGS.get(key, key): value
        for key, value in config.items()
        if key not in (*_IMMATERIAL, "rotary_dim")
    }
    counted = ("hidden_size", "num_attention_heads", "vocab_size")
    sizes: dict[str, Any] = {key: own.get(key) for key in counted}
    sizes["rotary_dim"] = config.get("rotary_dim", ROTARY_DIM)
    for key, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"config.json: {key} is {shortened(value)}, not a whole number.")
    hidden, heads, vocabulary, rotary = sizes.values()
    for key, value in {"intermediate_size": 4 * hidden, "num_key_value_heads": heads}.items():
        if own.get(key) is None:
            own[key] = value
    own["vocab_size"] = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    own["partial_rotary_factor"] = min(rotary, hidden // heads) / (hidden // heads)
    return {**own, "model_type": "phi", "architectures": ["PhiForCausalLM"]}


_QKV = tuple(f"model.layers.#.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))


def msft_renames(config: Mapping[str, Any]) -> Renames:
    """Make the table of tensor names of `phi-msft`."""
    return Renames(
        {
            "transformer.embd.wte": "model.embed_tokens",
            "transformer.h.#.ln": "model.layers.#.input_layernorm",
            "transformer.h.#.mixer.Wqkv": _QKV,
            "transformer.h.#.mixer.out_proj": "model.layers.#.self_attn.dense",
            "transformer.h.#.mixer.rotary_emb": "model.layers.#.self_attn.rotary_emb",
            "transformer.h.#.mlp.fc1": "model.layers.#.mlp.fc1",
            "transformer.h.#.mlp.fc2": "model.layers.#.mlp.fc2",
            "lm_head.ln": "model.final_layernorm",
            "lm_head.linear": "lm_head",
        }
    )


def mixformer_renames(config: Mapping[str, Any]) -> Renames:
    """Make the table of tensor names of `mixformer-sequential`: all layers in one row."""
    last = f"layers.{config['num_hidden_layers'] + 1}"
    return Renames(
        {
            "layers.0.wte": "model.embed_tokens",
            f"{last}.ln": "model.final_layernorm",
            f"{last}.linear": "lm_head",
            "layers.#+1.ln": "model.layers.#.input_layernorm",
            "layers.#+1.mixer.Wqkv": _QKV,
            "layers.#+1.mixer.out_proj": "model.layers.#.self_attn.dense",
            "layers.#+1.mixer.rotary_emb": "model.layers.#.self_attn.rotary_emb",
            "layers.#+1.mlp.fc1": "model.layers.#.mlp.fc1",
            "layers.#+1.mlp.fc2": "model.layers.#.mlp.fc2",
        }
    )
