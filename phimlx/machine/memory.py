"""Estimates of the memory that a model takes at a given context, and what this machine has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from phimlx.machine.device import crops_at_once, prefill_tokens, queries_at_once
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


class ImageEncoderShape(Protocol):
    """Dimensions of an image encoder that decide about memory."""

    @property
    def side(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...


class PatchEncoderShape(Protocol):
    """Dimensions of an encoder of whole images that decide about memory."""

    @property
    def patch_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...


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


def picture_bytes(vision: ImageEncoderShape, crops: int, itemsize: int = 2) -> int:
    """Estimate what encoding an image takes beside the weights, before its tokens are read.

    That is its pixels and those of the global view in float32, and the activations of the crops
    that are encoded at once, attention's scores in float32 among them, which fused attention does
    without.

    Args:
        crops: of the image; 36 at most as published.
    """
    patches = vision.side**2
    pixels = (1 + crops) * 3 * vision.image_size**2 * 4
    scores = 2 * vision.num_attention_heads * patches**2 * 4
    rows = patches * (2 * vision.intermediate_size + 8 * vision.hidden_size) * itemsize
    return pixels + min(1 + crops, crops_at_once()) * (scores + rows)


def patches_bytes(vision: PatchEncoderShape, patches: int, itemsize: int = 2) -> int:
    """Estimate what encoding an image of so many patches, all of them at once, takes."""
    pixels = patches * 3 * vision.patch_size**2 * 4
    # Scores of the piece that is computed and of those that MLX works ahead by.
    queries = min(patches, 4 * queries_at_once())
    scores = 3 * vision.num_attention_heads * queries * patches * 4
    rows = patches * (2 * vision.intermediate_size + 8 * vision.hidden_size) * itemsize
    return pixels + scores + rows


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
