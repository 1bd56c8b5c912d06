"""The rotation of queries and keys, bit by bit against transformers' formula."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from phimlx.models.rope import Rope, rotate

# Channels of a head and how many of them turn: phi-4, phi-4-mini, phi-2, and the least.
HEADS = [(128, 128), (128, 96), (80, 32), (64, 2), (2, 2), (6, 6)]
BATCH, COUNT, LENGTH = 2, 3, 5


def published(x: mx.array, angles: mx.array, scale: float) -> mx.array:
    """`apply_rotary_pos_emb` of transformers' modeling_phi3.py, in float32, rounded once.

    Args:
        angles: `[batch or 1, 1, length, dims / 2]`.
    """
    both = mx.concatenate([angles, angles], axis=-1)
    cos, sin = mx.cos(both) * scale, mx.sin(both) * scale
    dims = both.shape[-1]
    turning, rest = x[..., :dims].astype(mx.float32), x[..., dims:]
    first, second = turning[..., : dims // 2], turning[..., dims // 2 :]
    rotated_half = mx.concatenate([-second, first], axis=-1)
    turned = (turning * cos + rotated_half * sin).astype(x.dtype)
    return mx.concatenate([turned, rest], axis=-1)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize(("head_dim", "dims"), HEADS)
@pytest.mark.parametrize("rows", [1, BATCH])
def test_every_bit_is_that_of_the_published_formula(
    head_dim: int, dims: int, rows: int, dtype: mx.Dtype
) -> None:
    mx.random.seed(head_dim + dims)
    fused = mx.random.normal((BATCH, LENGTH, COUNT + 1, head_dim)).astype(dtype)
    x = fused.transpose(0, 2, 1, 3)[:, :COUNT]  # strided, as out of a fused projection
    rope = Rope(dims, 10000.0, attention_factor=1.1902380714238083)
    positions = mx.array([[0, 1, 77, 4096, 131071], [3, 4, 5, 6, 7]])[:rows]
    frequencies = rope.inverse_frequencies(0)
    angles = positions.astype(mx.float32)[:, None, :, None] * frequencies
    turned = rotate(x, *rope(positions, [0] * BATCH))
    assert turned.dtype == dtype
    assert mx.array_equal(turned, published(x, angles, rope.attention_factor)).item()


def test_rows_turn_by_their_own_factors() -> None:
    rope = Rope(4, 10000.0, (1.0, 1.0), (2.0, 3.0), original_max_position_embeddings=8)
    x, positions = mx.random.normal((BATCH, COUNT, LENGTH, 6)), mx.arange(LENGTH)[None]
    mixed = rotate(x, *rope(positions, [0, 1]))
    for row, table in enumerate([0, 1]):
        alone = rotate(x[row : row + 1], *rope(positions, [table]))
        assert mx.array_equal(mixed[row : row + 1], alone).item()


def test_angles_keep_their_precision_at_the_last_position() -> None:
    # Metal's mx.fast.rope takes cos and sin by functions that are off by 1e-2 here.
    rope, position = Rope(128, 10000.0), 131071
    cos, sin = rope(mx.array([[position]]), [0])
    for index, frequency in enumerate(rope.inverse_frequencies(0).tolist()):
        angle = mx.array(position, mx.float32) * mx.array(frequency)
        exact = float(angle.item())  # rounded to float32, as the reference rounds it
        assert cos[0, 0, 0, 0, index].item() == pytest.approx(math.cos(exact), abs=1e-6)
        assert sin[0, 0, 0, 1, index].item() == pytest.approx(math.sin(exact), abs=1e-6)


def test_what_does_not_turn_passes_through_whatever_it_is() -> None:
    x = mx.full((1, 1, 1, 4), mx.inf)
    turned = rotate(x, *Rope(2, 10000.0)(mx.array([[1]]), [0]))
    assert turned[..., 2:].tolist() == [[[[math.inf, math.inf]]]]
