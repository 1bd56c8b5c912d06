"""The phi3 architecture, of phi-4, phi-4-reasoning, phi-4-mini and their kin.

Fields carry the checkpoint's names. Knows logits; knows nothing of files, text or sampling.
Source: transformers `models/phi3/modeling_phi3.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from phimlx.models.adapters import Routing, project
from phimlx.models.cache.kv import Cache, Span, with_past
from phimlx.models.config import Phi3Config
from phimlx.models.phi4mm.features import Slots
from phimlx.models.rope import fuse, rotate

Linear = Callable[[int, int], nn.Module]
"""Makes a projection without bias from its input and output dimensions."""


def plain_linear(input_dims: int, output_dims: int) -> nn.Module:
    """A projection without adapters."""
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
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = linear(config.hidden_size, width)
        self.o_proj = linear(self.heads * self.head_dim, config.hidden_size)

    def __call__(
        self,
        x: mx.array,
        cos: mx.array,
        sin: mx.array,
        mask: mx.array | str | None,
        cache: Cache | None,
        routing: Routing | None = None,
    ) -> mx.array:
        batch, length, _ = x.shape
        qkv = project(self.qkv_proj, x, routing)
        qkv = qkv.reshape(batch, length, -1, self.head_dim).transpose(0, 2, 1, 3)
        turned = rotate(qkv[:, : self.heads + self.kv_heads], cos, sin)
        queries = turned[:, : self.heads]  # [batch, heads, length, head_dim]
        keys = turned[:, self.heads :]  # [batch, kv_heads, length, head_dim]
        values = qkv[:, self.heads + self.kv_heads :]
        if cache is not None:
            keys, values = cache.update(self.layer, keys, values)
        out = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=self.head_dim**-0.5, mask=mask
        )
        out = out.transpose(0, 2, 1, 3).reshape(batch, length, -1)
        return project(self.o_proj, out, routing)


class MLP(nn.Module):
    def __init__(self, config: Phi3Config, linear: Linear = plain_linear) -> None:
        super().__init__()
        self.gate_up_proj = linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array, routing: Routing | None = None) -> mx.array:
        gate, up = mx.split(project(self.gate_up_proj, x, routing), 2, axis=-1)
        return project(self.down_proj, _gated(gate, up), routing)


class DecoderLayer(nn.Module):
    def __init__(self, config: Phi3Config, layer: int, linear: Linear = plain_linear) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer, linear)
        self.mlp = MLP(config, linear)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self,
        x: mx.array,
        cos: mx.array,
        sin: mx.array,
        mask: mx.array | str | None,
        cache: Cache | None,
        routing: Routing | None = None,
    ) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, routing)
        return x + self.mlp(self.post_attention_layernorm(x), routing)


class Phi3Model(nn.Module):
    """Embedding and decoder layers: tokens to hidden states."""

    def __init__(self, config: Phi3Config, linear: Linear = plain_linear) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, i, linear) for i in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self,
        x: mx.array,
        cos: mx.array,
        sin: mx.array,
        span: Span,
        cache: Cache | None,
        routing: Routing | None = None,
    ) -> mx.array:
        for layer in self.layers:
            x = layer(x, cos, sin, span.mask, cache, routing)
        return self.norm(x)  # [batch, length, hidden]


class Phi3ForCausalLM(nn.Module):
    """A phi3 language model. Parameters carry the names of the published checkpoints.

    Attributes:
        slots: tokens that stand for pictures and sounds; None for a model that takes text only.
    """

    slots: Slots | None = None

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
            input_ids, attention_mask = with_past(stale, input_ids, attention_mask)
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

    @property
    def unused(self) -> tuple[str, ...]:
        """How the names of stored tensors begin that the model does without."""
        # A tied model has no head of its own; some checkpoints store a copy all the same.
        return ("lm_head.",) if self.config.tie_word_embeddings else ()
