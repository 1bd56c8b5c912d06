"""The phi3 architecture, of phi-4, phi-4-reasoning, phi-4-mini and their kin.

Fields carry the checkpoint's names. Knows logits; knows nothing of files, text or sampling.
Source: transformers `models/phi3/modeling_phi3.py`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from phimlx.models.cache import Cache, Span
from phimlx.models.config import Phi3Config
from phimlx.models.rope import fuse, rotate


@fuse
def _gated(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


class Attention(nn.Module):
    """Grouped-query attention with the query, key and value projections in one matrix."""

    def __init__(self, config: Phi3Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def __call__(
        self,
        x: mx.array,
        cos: mx.array,
        sin: mx.array,
        mask: mx.array | str | None,
        cache: Cache | None,
    ) -> mx.array:
        batch, length, _ = x.shape
        qkv = self.qkv_proj(x).reshape(batch, length, -1, self.head_dim).transpose(0, 2, 1, 3)
        turned = rotate(qkv[:, : self.heads + self.kv_heads], cos, sin)
        queries = turned[:, : self.heads]  # [batch, heads, length, head_dim]
        keys = turned[:, self.heads :]  # [batch, kv_heads, length, head_dim]
        values = qkv[:, self.heads + self.kv_heads :]
        if cache is not None:
            keys, values = cache.update(self.layer, keys, values)
        out = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=self.head_dim**-0.5, mask=mask
        )
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, config: Phi3Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(_gated(gate, up))


class DecoderLayer(nn.Module):
    def __init__(self, config: Phi3Config, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self,
        x: mx.array,
        cos: mx.array,
        sin: mx.array,
        mask: mx.array | str | None,
        cache: Cache | None,
    ) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Phi3Model(nn.Module):
    """Embedding and decoder layers: tokens to hidden states."""

    def __init__(self, config: Phi3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, x: mx.array, cos: mx.array, sin: mx.array, span: Span, cache: Cache | None
    ) -> mx.array:
        for layer in self.layers:
            x = layer(x, cos, sin, span.mask, cache)
        return self.norm(x)  # [batch, length, hidden]


class Phi3ForCausalLM(nn.Module):
    """A phi3 language model. Parameters carry the names of the published checkpoints."""

    def __init__(self, config: Phi3Config) -> None:
        super().__init__()
        self.config = config
        self.model = Phi3Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self,
        input_ids: mx.array,
        cache: Cache | None = None,
        attention_mask: mx.array | None = None,
    ) -> mx.array:
        """Logits of every given token.

        Args:
            input_ids: `[batch, length]`.
            cache: what came before, from `make_cache`; extended by this call. The logits are those
                of one pass over everything seen so far: where the sequence crosses the LongRoPE
                step, what the cache held is computed again with the other table.
            attention_mask: `[batch, length]`, 0 at padding, on either side of a row. Each row's
                logits are those of the row alone; at padding they mean nothing.

        Returns:
            `[batch, length, vocab]`.
        """
        return self.head(self.hidden_states(input_ids, cache, attention_mask))

    def hidden_states(
        self,
        input_ids: mx.array,
        cache: Cache | None = None,
        attention_mask: mx.array | None = None,
    ) -> mx.array:
        """What the output head sees, `[batch, length, hidden]`; arguments as in a call."""
        batch, length = input_ids.shape
        stale = None
        if cache is not None:
            stale = cache.stale_tokens((batch, length), attention_mask)
        if stale is not None:
            past_ids, past_mask = stale
            if past_mask is not None or attention_mask is not None:
                past_mask = mx.ones(past_ids.shape) if past_mask is None else past_mask
                new_mask = mx.ones(input_ids.shape) if attention_mask is None else attention_mask
                attention_mask = mx.concatenate([past_mask, new_mask], axis=1)
            input_ids = mx.concatenate([past_ids, input_ids], axis=1)
        # Without a cache, one without layers still says where the tokens stand.
        span = (cache or Cache(0, self.config.rope)).extend(input_ids, attention_mask)
        cos, sin = self.config.rope(span.positions, span.long)
        x = self.model(self.model.embed_tokens(input_ids), cos, sin, span, cache)
        if cache is not None:
            cache.commit()
        return x[:, -length:]

    def head(self, x: mx.array) -> mx.array:
        """Hidden states `[..., hidden]` to logits `[..., vocab]`."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(x)
        return self.lm_head(x)

    def make_cache(self, expected_length: int = 0) -> Cache:
        """An empty cache; `expected_length` is a length that the sequence is known to reach."""
        return Cache(self.config.num_hidden_layers, self.config.rope, expected_length)

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.layers
