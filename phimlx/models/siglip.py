"""The layers of SigLIP, which both of the family's image encoders consist of.

Source: transformers `models/siglip/modeling_siglip.py` and `models/siglip2/modeling_siglip2.py`.
"""

from __future__ import annotations

import math
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from phimlx.machine.device import on_gpu, queries_at_once
from phimlx.machine.order import after
from phimlx.models.rope import fuse


class EncoderShape(Protocol):
    """Dimensions of an encoder. `num_hidden_layers` counts the last layer, which nothing uses."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...


# Metal's fused attention has these head sizes; SigLIP's 72 becomes 80 by zeros.
FUSED_HEAD_DIMS = (64, 80, 128)

GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715 * GELU_LINEAR


@fuse
def gelu(x: mx.array) -> mx.array:
    """The exact GELU, which both encoders' projections use."""
    wide = x.astype(mx.float32)
    return (0.5 * wide * (1 + mx.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


@fuse
def _gelu_tanh(x: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    # ½ (1 + tanh z) = sigmoid(2 z)
    inner = wide * (GELU_LINEAR + GELU_CUBIC * (wide * wide))
    return (wide * mx.sigmoid(inner)).astype(x.dtype)


class Attention(nn.Module):
    """Attention of every patch to every unmasked patch of its picture."""

    def __init__(self, config: EncoderShape) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.scale = (config.hidden_size // config.num_attention_heads) ** -0.5
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self[name] = nn.Linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        batch, length, width = x.shape
        head_dim = width // self.heads
        padding = _fused_head_dim(head_dim) - head_dim

        def heads(rows: mx.array) -> mx.array:
            split = rows.reshape(batch, length, self.heads, head_dim)
            if padding:
                split = mx.pad(split, [(0, 0), (0, 0), (0, 0), (0, padding)])
            return split.transpose(0, 2, 1, 3)  # [batch, heads, length, head_dim]

        queries, keys, values = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        parts: list[mx.array] = []
        size = queries_at_once()
        for start in range(0, length, size):
            part = after(queries[:, :, start : start + size], *parts[-1:])
            parts.append(
                mx.fast.scaled_dot_product_attention(
                    part, keys, values, scale=self.scale, mask=mask
                )
            )
        out = mx.concatenate(parts, axis=2)
        out = out[..., :head_dim].transpose(0, 2, 1, 3)
        return self.out_proj(out.reshape(batch, length, width))


def _fused_head_dim(head_dim: int) -> int:
    if not mx.metal.is_available() or not on_gpu():
        return head_dim
    return min((size for size in FUSED_HEAD_DIMS if size >= head_dim), default=head_dim)


class MLP(nn.Module):
    def __init__(self, config: EncoderShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(_gelu_tanh(self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, config: EncoderShape) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """All layers but the last: features are the hidden states before it."""

    def __init__(self, config: EncoderShape) -> None:
        super().__init__()
        self.layers = [EncoderLayer(config) for _ in range(config.num_hidden_layers - 1)]
