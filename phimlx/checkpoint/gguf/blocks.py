"""The packed blocks of GGUF tensors -> numbers, as llama.cpp unpacks them, bit for bit.

Every function takes the blocks as bytes, `[blocks, bytes of one]` uint8, and gives float32
`[blocks, numbers of one]`. Source: llama.cpp, ggml/src/ggml-quants.c, `dequantize_row_*`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

SUPER = 256  # numbers of a block of the K-quants


@dataclass(frozen=True)
class BlockType:
    """A form of packed numbers.

    Attributes:
        name: llama.cpp's.
        numbers, nbytes: of one block.
        unpack: gives a block's numbers; None where they are numbers of `dtype` as they stand.
    """

    name: str
    numbers: int
    nbytes: int
    unpack: Callable[[mx.array], mx.array] | None = field(default=None, repr=False)
    dtype: mx.Dtype = mx.float32

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of so many numbers, which blocks divide."""
        return width // self.numbers * self.nbytes

    def decode(self, data: mx.array, width: int) -> mx.array:
        """Give the numbers of whole rows.

        Args:
            data: uint8, one row's bytes after the other's.

        Returns:
            `[rows, width]` of `dtype`.
        """
        if self.unpack is None:
            return data.view(self.dtype).reshape(-1, width)
        return self.unpack(data.reshape(-1, self.nbytes)).reshape(-1, width)


def _halves(blocks: mx.array, first: int) -> mx.array:
    """The float16 at byte `first` of each block, `[blocks, 1]` in float32."""
    return mx.contiguous(blocks[:, first : first + 2]).view(mx.float16).astype(mx.float32)


def _fields(data: mx.array, bits: int, run: int) -> mx.array:
    """Numbers of `bits` bits: the lowest of `run` bytes in a row, then the next of all of these.

    Args:
        data: uint8 `[blocks, bytes]`.

    Returns:
        uint8 `[blocks, bytes * 8 / bits]`.
    """
    shifts = mx.arange(0, 8, bits, dtype=mx.uint8)[:, None]
    runs = data.reshape(data.shape[0], -1, 1, run) >> shifts
    return (runs & ((1 << bits) - 1)).reshape(data.shape[0], -1)


def _float(numbers: mx.array, less: int = 0) -> mx.array:
    return (numbers.astype(mx.int8) - less).astype(mx.float32)


def _q4_0(blocks: mx.array) -> mx.array:
    return _halves(blocks, 0) * _float(_fields(blocks[:, 2:], 4, 16), 8)


def _q4_1(blocks: mx.array) -> mx.array:
    return _halves(blocks, 0) * _float(_fields(blocks[:, 4:], 4, 16)) + _halves(blocks, 2)


def _fifth_bits(blocks: mx.array, first: int) -> mx.array:
    """Bits of 4 bytes, in order, each where a fifth bit stands: uint8 `[blocks, 32]`."""
    return _fields(blocks[:, first : first + 4], 1, 1) << 4


def _q5_0(blocks: mx.array) -> mx.array:
    return _halves(blocks, 0) * _float(_fields(blocks[:, 6:], 4, 16) | _fifth_bits(blocks, 2), 16)


def _q5_1(blocks: mx.array) -> mx.array:
    numbers = _fields(blocks[:, 8:], 4, 16) | _fifth_bits(blocks, 4)
    return _halves(blocks, 0) * _float(numbers) + _halves(blocks, 2)


def _q8_0(blocks: mx.array) -> mx.array:
    numbers = mx.contiguous(blocks[:, 2:]).view(mx.int8)
    return numbers.astype(mx.float32) * _halves(blocks, 0)


def _scaled(scales: mx.array, numbers: mx.array) -> mx.array:
    """Multiply as many numbers in a row by each scale; `[blocks, scales, numbers of each]`."""
    count, each = scales.shape
    return scales[:, :, None] * numbers.reshape(count, each, -1)


def _q2_k(blocks: mx.array) -> mx.array:
    packed, scale, least = blocks[:, :16], _halves(blocks, 80), _halves(blocks, 82)
    scaled = _scaled(scale * _float(packed & 15), _float(_fields(blocks[:, 16:80], 2, 32)))
    return (scaled - (least * _float(packed >> 4))[:, :, None]).reshape(-1, SUPER)


def _q3_k(blocks: mx.array) -> mx.array:
    low, high = _fields(blocks[:, 96:104], 4, 8), _fields(blocks[:, 104:108], 2, 4)
    scales = _halves(blocks, 108) * _float(low | (high << 4), 32)
    lifted = _fields(blocks[:, :32], 1, 32) << 2  # where that bit is not set, 4 is taken away
    numbers = _float(_fields(blocks[:, 32:96], 2, 32) + lifted, 4)
    return _scaled(scales, numbers).reshape(-1, SUPER)


def _scales_and_least(blocks: mx.array) -> tuple[mx.array, mx.array]:
    """Scales and least values of the 8 parts of Q4_K and Q5_K, `[blocks, 8]` each, in float32.

    They have 6 bits each: of the first four the low ones of 4 + 4 bytes, of the last four a nibble
    of 4 bytes, and the two bits that are left of the first.
    """
    first, second, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = mx.concatenate([first & 63, (both & 15) | ((first >> 2) & 48)], axis=1)
    least = mx.concatenate([second & 63, (both >> 4) | ((second >> 2) & 48)], axis=1)
    return _halves(blocks, 0) * _float(scales), _halves(blocks, 2) * _float(least)


def _q4_k(blocks: mx.array) -> mx.array:
    scales, least = _scales_and_least(blocks)
    numbers = _float(_fields(blocks[:, 16:], 4, 32))
    return (_scaled(scales, numbers) - least[:, :, None]).reshape(-1, SUPER)


def _q5_k(blocks: mx.array) -> mx.array:
    scales, least = _scales_and_least(blocks)
    numbers = _float(_fields(blocks[:, 48:], 4, 32) | (_fields(blocks[:, 16:48], 1, 32) << 4))
    return (_scaled(scales, numbers) - least[:, :, None]).reshape(-1, SUPER)


def _q6_k(blocks: mx.array) -> mx.array:
    scales = _halves(blocks, 208) * _float(mx.contiguous(blocks[:, 192:208]).view(mx.int8))
    low, high = _fields(blocks[:, :128], 4, 64), _fields(blocks[:, 128:192], 2, 32)
    return _scaled(scales, _float(low | (high << 4), 32)).reshape(-1, SUPER)


# By the number that a file has for them.
BY_NUMBER = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2, dtype=mx.float16),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    10: BlockType("Q2_K", SUPER, 84, _q2_k),
    11: BlockType("Q3_K", SUPER, 110, _q3_k),
    12: BlockType("Q4_K", SUPER, 144, _q4_k),
    13: BlockType("Q5_K", SUPER, 176, _q5_k),
    14: BlockType("Q6_K", SUPER, 210, _q6_k),
    30: BlockType("BF16", 1, 2, dtype=mx.bfloat16),
}

# Of all types, as llama.cpp names them.
TYPE_NAMES = {number: kind.name for number, kind in BY_NUMBER.items()} | {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
