"""Estimates of the memory that a model takes at a given context, and what this machine has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from phimlx.machine.device import crops_at_once, on_gpu, prefill_tokens, queries_at_once
from phimlx.machine.kv_bits import kv_bytes_per_value, kv_group_size


class Shape(Protocol):
    """Dimensions that decide about memory; the catalogue's models have them too."""

    @property
    def kv_layers(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    def constant_cache_bytes(self, itemsize: int) -> int: ...


class PatchEncoderShape(Protocol):
    """Dimensions of an image encoder that decide about memory."""

    @property
    def patch_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...


class CropEncoderShape(PatchEncoderShape, Protocol):
    """The same of one that encodes crops."""

    @property
    def side(self) -> int: ...
    @property
    def image_size(self) -> int: ...


class SoundEncoderShape(Protocol):
    """Dimensions of a sound encoder that decide about memory."""

    @property
    def input_size(self) -> int: ...
    @property
    def conv_channels(self) -> int: ...
    @property
    def attention_dim(self) -> int: ...
    @property
    def attention_heads(self) -> int: ...
    @property
    def linear_units(self) -> int: ...


FLOAT32 = 4  # bytes

# How Phi-4-multimodal's sound encoder cuts a sound, as `phimlx.models.phi4mm.conformer` does it.
FRAMES_A_TOKEN = 8
CONVOLVED_TOKENS = 32
ATTENDED_TOKENS = 500
CHUNKS_AT_ONCE = 4


@dataclass(frozen=True)
class Footprint:
    """Bytes that generation takes with `context` tokens of prompt and reply together.

    Attributes:
        weights: read once, and held.
        cache: keys and values of every token in every layer that keeps them, and what others keep.
        working: activations of one piece of the prompt, and the part of a quantized cache that is
            dequantized meanwhile; an estimate.
    """

    context: int
    weights: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.working


def footprint(
    shape: Shape, weights: int, context: int, itemsize: int = 2, kv_bits: int | None = None
) -> Footprint:
    """The memory that a model needs.

    Args:
        weights: bytes of them.
        itemsize: bytes of one number in the computation: 2 for bfloat16 and float16.
        kv_bits: what keys and values are quantized to; not at all where None.
    """
    return Footprint(
        context=context,
        weights=weights,
        cache=cache_bytes(shape, context, itemsize, kv_bits),
        working=min(context, prefill_tokens()) * _activations(shape) * itemsize
        + context * dequantized_bytes_per_token(shape, itemsize, kv_bits),
    )


def longest_context(
    shape: Shape, weights: int, memory: int, itemsize: int = 2, kv_bits: int | None = None
) -> int:
    """Count the tokens that fit into `memory` bytes beside the weights; 0 where none do."""
    left = memory - weights - prefill_tokens() * _activations(shape) * itemsize
    left -= shape.constant_cache_bytes(itemsize)
    each = cache_bytes_per_token(shape, itemsize, kv_bits) + dequantized_bytes_per_token(
        shape, itemsize, kv_bits
    )
    return max(0, left // each)


def cache_bytes(shape: Shape, tokens: int, itemsize: int = 2, kv_bits: int | None = None) -> int:
    """Count what a cache of so many tokens takes."""
    constant = shape.constant_cache_bytes(itemsize)
    return constant + tokens * cache_bytes_per_token(shape, itemsize, kv_bits)


def cache_bytes_per_token(shape: Shape, itemsize: int = 2, kv_bits: int | None = None) -> int:
    """Count what keys and values of one token take in all layers that keep every token's.

    Args:
        kv_bits: what they are quantized to; not at all where None, or where no groups divide heads.
    """
    values = 2 * shape.kv_layers * shape.num_key_value_heads * shape.head_dim
    return int(values * kv_bytes_per_value(shape.head_dim, itemsize, kv_bits))


def dequantized_bytes_per_token(shape: Shape, itemsize: int, kv_bits: int | None) -> int:
    """Count what a token's keys and values take in the one layer that is dequantized at a time."""
    if kv_bits is None or kv_group_size(shape.head_dim) is None:
        return 0
    return 2 * shape.num_key_value_heads * shape.head_dim * itemsize


def picture_bytes(vision: CropEncoderShape, crops: int, itemsize: int = 2) -> int:
    """Estimate what encoding an image takes beside the weights, before its tokens are read.

    That is its pixels and those of the global view in float32, the features of each crop, and a
    layer of the crops that are encoded at once.

    Args:
        crops: of the image; 36 at most as published.
    """
    patches = vision.side**2
    kept = 3 * vision.image_size**2 * FLOAT32 + patches // 4 * vision.hidden_size * itemsize
    at_once = min(1 + crops, crops_at_once())
    return (1 + crops) * kept + at_once * _encoder_layer(vision, patches, itemsize)


def patches_bytes(vision: PatchEncoderShape, patches: int, itemsize: int = 2) -> int:
    """Estimate what encoding an image of so many patches, all of them at once, takes."""
    pixels = 3 * vision.patch_size**2 * FLOAT32
    return patches * pixels + _encoder_layer(vision, patches, itemsize)


def _encoder_layer(vision: PatchEncoderShape, patches: int, itemsize: int) -> int:
    """Bytes of attention, whose scores a GPU does without, or else of the MLP.

    Counted are the arrays that MLX was seen to hold at one time on a CPU.
    """
    hidden = vision.hidden_size * itemsize
    scores = vision.num_attention_heads * min(patches, queries_at_once()) * itemsize
    attention = 23.5 * hidden + (0 if on_gpu() else 8 * scores)
    copies = 2 * itemsize if itemsize < FLOAT32 else 0  # in the model's type beside float32
    mlp = 18 * hidden + (3 * FLOAT32 + copies) * vision.intermediate_size
    return round(patches * max(attention, mlp))


def sound_bytes(audio: SoundEncoderShape, tokens: int, itemsize: int = 2) -> int:
    """Estimate what encoding a sound takes beside the weights, before its tokens are read.

    That is its frames, and the activations of the convolutions over a block of them, or of the
    layers over the tokens that attend to each other: scores, distances and hidden states. Counted
    are the arrays that MLX was seen to hold at one time on a CPU.

    Args:
        tokens: of the sound, of eight frames each.
    """
    frames = FRAMES_A_TOKEN * tokens * audio.input_size * FLOAT32
    block = 4 * min(tokens, CONVOLVED_TOKENS + 1) * audio.input_size // 2 * audio.conv_channels
    convolved = (3.2 * FLOAT32 + 1.9 * itemsize) * block + frames
    length = min(tokens, ATTENDED_TOKENS)
    chunks = max(1, min(tokens // ATTENDED_TOKENS, CHUNKS_AT_ONCE))
    scores = audio.attention_heads * length**2 * itemsize
    attention = scores * (1 + (2 * chunks if chunks > 1 else 1)) + 10 * length**2
    attention += chunks * length * audio.attention_dim * (6 * FLOAT32 + 14 * itemsize)
    width = audio.linear_units + audio.attention_dim
    units = chunks * length * width * 10 * itemsize
    return round(frames + max(convolved, attention, units))


def machine_memory() -> int:
    """Bytes that a model may take here: what Metal recommends, else all of the memory."""
    import mlx.core as mx

    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    import psutil

    return psutil.virtual_memory().total


def _activations(shape: Shape) -> int:
    """Numbers that a token holds in the widest layer while it is computed, as measured."""
    return 6 * shape.intermediate_size + 12 * shape.hidden_size
