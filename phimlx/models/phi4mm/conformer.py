"""The conformer of Phi-4-multimodal's audio encoder: log-mel frames to hidden states.

Nothing here waits for a value, so it can be differentiated and compiled.
Source: the checkpoint's own `speech_conformer_encoder.py`; transformers
`models/phi4_multimodal/modeling_phi4_multimodal.py`, whose mask of padded clips is not followed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from phimlx.machine.order import after
from phimlx.models.phi4mm.config import AudioConfig
from phimlx.models.rope import fuse

# Tokens that attend to each other: what is longer falls into independent chunks of so many.
MAX_TOKENS = 500

# Subsampling holds tokens · 4 · 40 · 1024 numbers at its widest, so a clip passes in blocks;
# larger ones leave a processor's cache and take longer there.
BLOCK_TOKENS = 32
CHUNKS_AT_ONCE = 4


@fuse
def _swish(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


@fuse
def _gated(up: mx.array, gate: mx.array) -> mx.array:
    return up * (gate * mx.sigmoid(gate))


@fuse
def _add_half(x: mx.array, y: mx.array) -> mx.array:
    return x + 0.5 * y


class Conv(nn.Module):
    """Parameters of a convolution in torch's layout, `[out, in / groups, *kernel]`."""

    def __init__(self, channels_in: int, channels_out: int, *kernel: int) -> None:
        super().__init__()
        self.weight = mx.zeros((channels_out, channels_in, *kernel))
        self.bias = mx.zeros((channels_out,))


class Pointwise(Conv):
    """A convolution with a kernel of one: a linear map of the channels, which come last."""

    def matrix(self) -> mx.array:
        """`[in, out]`."""
        return self.weight.reshape(len(self.weight), -1).T

    def __call__(self, x: mx.array) -> mx.array:
        return mx.addmm(self.bias, x, self.matrix())

    def often(self) -> Callable[[mx.array], mx.array]:
        """The same map for many rows: the BLAS in MLX's wheel for Linux is nearly twice as fast
        where the matrix lies in memory as it is multiplied."""
        bias, matrix = self.bias, mx.contiguous(self.matrix())
        return lambda x: mx.addmm(bias, x, matrix)


class Strided(Conv):
    """Every second place of a padded 3 × 3 convolution of one channel."""

    def __call__(self, x: mx.array) -> mx.array:
        """`[batch, time, bins, 1]` to `[batch, ⌈time / 2⌉, ⌈bins / 2⌉, out]`."""
        return mx.conv2d(x, self.weight.transpose(0, 2, 3, 1), stride=2, padding=1) + self.bias


class StridedDepthwise(Conv):
    """Every second place of a padded 3 × 3 convolution of each channel by itself.

    Written as weighted steps: on the CPU, `mx.conv2d` in groups of one channel takes up to three
    times as long.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """`[batch, time, bins, channels]` to `[batch, ⌈time / 2⌉, ⌈bins / 2⌉, channels]`."""
        _, time, bins, _ = x.shape
        padded = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        total = self.bias.astype(mx.float32)
        for i in range(3):
            row = padded[:, i : i + time : 2]
            steps = [row[:, :, j : j + bins : 2] for j in range(3)]
            total = _weighted(total, *steps, *(self.weight[:, 0, i, j] for j in range(3)))
        return total.astype(x.dtype)


class CausalDepthwise(Conv):
    """Each channel's last `kernel` steps, weighted."""

    def __call__(self, x: mx.array) -> mx.array:
        """`[batch, time, channels]` to the same shape."""
        kernel, time = self.weight.shape[-1], x.shape[1]
        padded = mx.pad(x, [(0, 0), (kernel - 1, 0), (0, 0)])
        steps = [padded[:, i : i + time] for i in range(kernel)]
        return _weighted(self.bias, *steps, *(self.weight[:, 0, i] for i in range(kernel)))


@fuse
def _weighted(bias: mx.array, *arrays: mx.array) -> mx.array:
    half = len(arrays) // 2
    total = bias.astype(mx.float32)
    for step, weight in zip(arrays[:half], arrays[half:], strict=True):
        total = total + step * weight.astype(mx.float32)
    return total.astype(bias.dtype)


class Relu(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        return mx.maximum(x, 0)


class Subsampling(nn.Module):
    """Three strided convolutions: eight frames to a token."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        channels = config.conv_channels
        self.conv = [Strided(1, channels, 3, 3), Relu()]
        for _ in range(2):
            self.conv += [
                StridedDepthwise(1, channels, 3, 3),
                Pointwise(channels, channels, 1, 1),
                Relu(),
            ]
        self.out = nn.Linear(channels * math.ceil(config.input_size / 8), config.attention_dim)

    def __call__(self, frames: mx.array) -> mx.array:
        """`[frames, bins]` to `[⌈frames / 8⌉, attention_dim]`.

        A token sees the fifteen frames around its first, so a block that starts one token early and
        drops that token equals the whole.
        """
        count = audio_tokens(len(frames))
        layers = [layer.often() if isinstance(layer, Pointwise) else layer for layer in self.conv]
        blocks: list[mx.array] = []
        for start in range(0, count, BLOCK_TOKENS):
            early = min(start, 1)
            x = frames[None, 8 * (start - early) : 8 * (start + BLOCK_TOKENS), :, None]
            x = after(x, *blocks[-1:])
            for layer in layers:
                x = layer(x)  # [1, tokens, bins / 8, channels] in the end
            x = x[0, early:].transpose(0, 2, 1)
            blocks.append(self.out(x.reshape(len(x), -1)))
        return mx.concatenate(blocks)


class FeedForward(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.attention_dim)
        self.net = [
            GatedLinear(config.attention_dim, config.linear_units),
            nn.Identity(),
            nn.Linear(config.linear_units, config.attention_dim),
        ]

    def __call__(self, x: mx.array) -> mx.array:
        gated, _, down = self.net
        return down(gated(self.layer_norm(x)))


class GatedLinear(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels_in, 2 * channels_out)

    def __call__(self, x: mx.array) -> mx.array:
        return _gated(*mx.split(self.linear(x), 2, axis=-1))


class Attention(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.heads = config.attention_heads
        for name in ("linear_q", "linear_k", "linear_v", "linear_out"):
            self[name] = nn.Linear(config.attention_dim, config.attention_dim)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        batch, length, width = x.shape
        queries, keys, values = (
            linear(x).reshape(batch, length, self.heads, -1).transpose(0, 2, 1, 3)
            for linear in (self.linear_q, self.linear_k, self.linear_v)
        )  # [batch, heads, length, head_dim]
        out = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=(width // self.heads) ** -0.5, mask=bias
        )
        return self.linear_out(out.transpose(0, 2, 1, 3).reshape(batch, length, width))


class PointwiseGate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ext_pw_conv_1d = Pointwise(channels, 2 * channels, 1)
        self.b1 = mx.zeros((1, channels, 1))
        self.b2 = mx.zeros((1, channels, 1))

    def __call__(self, x: mx.array) -> mx.array:
        up, gate = mx.split(self.ext_pw_conv_1d(x), 2, axis=-1)
        return _gated_with_bias(up, self.b1[:, :, 0], gate, self.b2[:, :, 0])


@fuse
def _gated_with_bias(up: mx.array, b1: mx.array, gate: mx.array, b2: mx.array) -> mx.array:
    gate = gate + b2
    return (up + b1) * (gate * mx.sigmoid(gate))


class SeparableConv(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.dw_conv = CausalDepthwise(1, config.attention_dim, config.kernel_size)
        self.pw_conv = Pointwise(config.attention_dim, config.attention_dim, 1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.pw_conv(self.dw_conv(x))


class Convolution(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.attention_dim)
        self.glu = PointwiseGate(config.attention_dim)
        self.dw_sep_conv_1d = SeparableConv(config)
        self.ext_pw_conv_1d = Pointwise(config.attention_dim, config.attention_dim, 1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.ext_pw_conv_1d(_swish(self.dw_sep_conv_1d(self.glu(self.layer_norm(x)))))


class ConformerLayer(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.feed_forward_in = FeedForward(config)
        self.self_attn = Attention(config)
        self.conv = Convolution(config)
        self.feed_forward_out = FeedForward(config)
        self.layer_norm_att = nn.LayerNorm(config.attention_dim)
        self.layer_norm = nn.LayerNorm(config.attention_dim)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        x = _add_half(x, self.feed_forward_in(x))
        x = x + self.self_attn(self.layer_norm_att(x), bias)
        x = x + self.conv(x)
        return self.layer_norm(_add_half(x, self.feed_forward_out(x)))


class MeanVarianceNorm(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.global_mean = mx.zeros((config.input_size,))
        self.global_invstd = mx.ones((config.input_size,))

    def __call__(self, frames: mx.array) -> mx.array:
        return (frames - self.global_mean) * self.global_invstd


class RelativeBias(nn.Module):
    """A learnt number for each distance and head, added to the attention scores."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.max_distance = config.t5_bias_max_distance
        self.bias_values = nn.Embedding(2 * self.max_distance, config.attention_heads)

    def __call__(self, length: int) -> mx.array:
        """`[heads, length, length]`, by query and key."""
        places = mx.arange(length)
        distance = mx.clip(places - places[:, None], -self.max_distance, self.max_distance - 1)
        return self.bias_values.weight.T[:, distance + self.max_distance]


class Encoder(nn.Module):
    """Frames of one clip to its tokens."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.encoder_embedding = MeanVarianceNorm(config)
        self.embed = Subsampling(config)
        self.relative_attention_bias_layer = RelativeBias(config)
        self.encoders = [ConformerLayer(config) for _ in range(config.num_blocks)]

    def __call__(self, frames: mx.array, tokens: int, pad: bool) -> mx.array:
        """`[frames, bins]` to `[tokens, attention_dim]`.

        Args:
            frames: of the clip, and as much of a batch's padding as its last token sees.
            tokens: of the clip; those after them are cut off, which is what masking them does,
                since nothing but attention looks to the right.
            pad: fill the last chunk of a folded clip with zeros that *are* attended to, as the
                original does with a single clip.
        """
        frames = self.encoder_embedding(frames.astype(mx.float32))
        x = self.embed(frames.astype(self.embed.out.bias.dtype))[:tokens]
        rest = tokens % MAX_TOKENS
        if pad and rest and tokens > MAX_TOKENS:
            x = mx.pad(x, [(0, MAX_TOKENS - rest), (0, 0)])
        whole = len(x) - len(x) % MAX_TOKENS
        chunks = x[:whole].reshape(-1, MAX_TOKENS, x.shape[-1])
        parts = [chunks[i : i + CHUNKS_AT_ONCE] for i in range(0, len(chunks), CHUNKS_AT_ONCE)]
        if whole < len(x):
            parts.append(x[None, whole:])
        encoded: list[mx.array] = []
        for part in parts:
            encoded.append(self._attend(after(part, *encoded[-1:])))
        return mx.concatenate(encoded)[:tokens]

    def _attend(self, x: mx.array) -> mx.array:
        """`[chunks, length, attention_dim]` through the layers, as `[tokens, attention_dim]`."""
        bias = self.relative_attention_bias_layer(x.shape[1]).astype(x.dtype)
        for layer in self.encoders:
            x = layer(x, bias)
        return x.reshape(-1, x.shape[-1])


def audio_tokens(frames: int) -> int:
    """Tokens of a clip of so many log-mel frames."""
    return math.ceil(frames / 8)
