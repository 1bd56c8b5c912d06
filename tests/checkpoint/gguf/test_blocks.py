"""Packed blocks, against the numbers that the `gguf` package gives of them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from phimlx.checkpoint.gguf.blocks import BY_NUMBER, TYPE_NAMES, BlockType

GOLDENS = Path(__file__).parents[2] / "goldens" / "gguf"
PACKED = [kind for kind in BY_NUMBER.values() if kind.unpack is not None]


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one.view(np.uint32) == other.view(np.uint32)).all())


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
def test_numbers_are_llama_cpps_bit_for_bit(kind: BlockType) -> None:
    golden = mx.load(str(GOLDENS / "blocks.safetensors"))
    packed, numbers = golden[f"{kind.name}.packed"], np.array(golden[f"{kind.name}.numbers"])
    assert packed.shape == (8, kind.nbytes)
    assert np.count_nonzero(numbers) > numbers.size // 2
    for rows in (1, 2, 8):
        width = 8 // rows * kind.numbers
        decoded = np.array(kind.decode(packed.reshape(-1), width))
        assert decoded.shape == (rows, width)
        assert same_bits(decoded.reshape(-1), numbers.reshape(-1))


def test_types_are_the_packages() -> None:
    gguf = pytest.importorskip("gguf")
    known = {int(each): each.name for each in gguf.GGMLQuantizationType}
    assert TYPE_NAMES.items() <= known.items()
    for number, kind in BY_NUMBER.items():
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
        assert sizes == (kind.numbers, kind.nbytes), kind.name


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
def test_any_bytes_are_the_packages_numbers(kind: BlockType) -> None:
    gguf = pytest.importorskip("gguf")
    random = np.random.default_rng(3)
    packed = random.integers(0, 256, (64, kind.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind.name])
    decoded = np.array(kind.decode(mx.array(packed).reshape(-1), kind.numbers))
    finite = np.isfinite(expected)  # scales of any bits may be NaN
    assert finite.mean() > 0.5
    assert (np.isfinite(decoded) == finite).all()
    assert same_bits(decoded[finite], expected[finite])


def test_what_a_type_is_tells_nothing_of_this_process() -> None:
    """It goes into the digest by which a conversion is taken up again."""
    assert all("0x" not in repr(kind) for kind in PACKED)
