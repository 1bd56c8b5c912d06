"""Keys and values in 8 and 4 bits, against a pass without a cache that is given what is held.

Quantizing is not continuous: two passes whose keys differ by one rounding may hold another code
where a number lies on the edge between two. So what is held is compared with what
`mx.quantize` makes of the pass's own keys and values, edges aside, and the logits with a pass that
attends to exactly what is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import GenerationError
from phimlx.generation.prefill import prefill
from phimlx.machine.kv_bits import GROUPS, kv_bytes_per_value, kv_group_size
from phimlx.models import base
from phimlx.models.base import CausalLM
from phimlx.models.cache.kv import Cache
from phimlx.models.cache.quantized import FEW, QuantizedStore, make_store
from phimlx.models.cache.store import Store, attention
from phimlx.models.phi3 import Phi3Config, Phi3ForCausalLM
from tests.training.models import CONFIG

MODELS = Path(__file__).parents[1] / "goldens" / "models"
EXACT = 1e-4  # of the largest logit
EDGES = 0.01  # part of the groups that may hold a number on the edge between two codes
BITS = pytest.mark.parametrize("bits", [8, 4])


def load(name: str) -> CausalLM:
    """Models with heads of 128 and a step at 32, of 64 and a window, of 32, and of 96."""
    if name == "heads of 96":
        mx.random.seed(3)
        shape = {**CONFIG, "hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
        factors = {"short_factor": [1.0] * 48, "long_factor": [1 + i / 4 for i in range(48)]}
        return Phi3ForCausalLM(
            Phi3Config.from_dict({**shape, "rope_scaling": {"type": "longrope", **factors}})
        )
    return load_model(Checkpoint(MODELS / name), mx.float32)


@pytest.fixture(scope="module", params=["mini-step-32", "phi-3-window", "phi-4", "heads of 96"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return load(request.param)


@pytest.fixture(scope="module")
def mini() -> CausalLM:
    return load("mini-step-32")


def tokens(model: CausalLM, length: int, seed: int = 0) -> list[int]:
    high = model.config.vocab_size - 1
    return mx.random.randint(3, high, (length,), key=mx.random.key(seed)).tolist()  # type: ignore[return-value]


def held(cache: Cache, layer: int, bits: int, group: int, row: int) -> list[mx.array]:
    """Keys and values `[1, kv_heads, real columns, head_dim]` of a row, dequantized."""
    buffers = [part[row : row + 1, :, : cache.length] for part in cache.store.layers[layer]]
    if cache.valid is not None:
        real = np.flatnonzero(np.array(cache.valid[row, : cache.length]))
        buffers = [part[:, :, mx.array(real)] for part in buffers]
    pairs = (buffers[:3], buffers[3:])
    return [mx.dequantize(w, s, b, group, bits) for w, s, b in pairs]


def expected(
    model: CausalLM, ids: Sequence[int], cache: Cache, row: int = 0, **inputs: Any
) -> mx.array:
    """Logits `[length, vocab]` of one plain pass over the row, attending to what the cache holds.

    What it holds is checked against the pass's own keys and values on the way.
    """
    bits = cache.kv_bits
    assert bits is not None
    group = next(size for size in GROUPS if model.config.head_dim % size == 0)
    layers: Iterator[int] = iter(range(model.config.num_hidden_layers))

    def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: Any) -> mx.array:
        mine = held(cache, next(layers), bits, group, row)
        for own, kept in zip((keys, values), mine, strict=True):
            packed, scales, biases = mx.quantize(own, group, bits)
            difference = mx.abs(mx.dequantize(packed, scales, biases, group, bits) - kept)
            step = mx.repeat(mx.abs(scales), group, axis=-1)
            assert (difference <= 1.01 * step).all().item()
            # An edge may be that of the scale, and then its whole group is another.
            others = (difference > 0.01 * step).reshape(-1, group).any(axis=1)
            assert others.sum().item() <= max(2, EDGES * others.size)
        return attention(queries, mine[0], mine[1], mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "attention", attend)
        logits = model(mx.array([ids]), **inputs)[0]
        mx.eval(logits)
    assert next(layers, None) is None
    return logits


def difference(found: mx.array, wanted: mx.array) -> float:
    return float(mx.abs(found - wanted).max() / mx.abs(wanted).max())


def fed(model: CausalLM, ids: Sequence[int], cache: Cache, size: int) -> mx.array:
    """Logits `[length, vocab]` of tokens given in pieces."""
    pieces = list(prefill(model, np.array([ids]), cache, size=size))
    return model.head(mx.concatenate(pieces, axis=1))[0]


@BITS
@pytest.mark.parametrize("length", [24, 60])
@pytest.mark.parametrize("size", [60, FEW + 1, FEW, 1])
def test_either_regime_in_pieces(model: CausalLM, bits: int, length: int, size: int) -> None:
    cache, ids = model.make_cache(length, kv_bits=bits), tokens(model, length)
    logits = fed(model, ids, cache, size)
    wanted = expected(model, ids, cache)
    assert difference(logits, wanted) <= EXACT
    assert difference(model(mx.array([ids]))[0], wanted) > 1e-3  # quantized it is


@BITS
def test_across_the_step(mini: CausalLM, bits: int) -> None:
    """The prompt is short, and what is held is computed again when the 33rd token comes."""
    cache, ids = mini.make_cache(kv_bits=bits), tokens(mini, 40)
    logits = fed(mini, ids[:30], cache, 30)
    assert difference(logits, expected(mini, ids[:30], cache)) <= EXACT
    for length in range(31, 41):
        logits = fed(mini, ids[length - 1 : length], cache, 1)
        assert cache.long == (length > 32,)
        assert difference(logits[-1], expected(mini, ids[:length], cache)[-1]) <= EXACT


@BITS
@pytest.mark.parametrize("lengths", [(30, 21, 9), (60, 40, 33), (60, 31, 5)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch(model: CausalLM, bits: int, lengths: tuple[int, ...], side: str) -> None:
    rows = [tokens(model, length, seed) for seed, length in enumerate(lengths)]
    longest = max(lengths)
    pads = [(longest - n, 0) if side == "left" else (0, longest - n) for n in lengths]
    ids = mx.array(np.array([np.pad(row, pad) for row, pad in zip(rows, pads, strict=True)]))
    mask = ids > 0  # no token is 0
    cache = model.make_cache(kv_bits=bits)
    logits = model(ids, cache, mask)
    if side == "left":  # and on from there
        more = mx.array([[7], [8], [9]])
        logits = mx.concatenate([logits, model(more, cache)], axis=1)
        rows = [[*row, int(new)] for row, new in zip(rows, (7, 8, 9), strict=True)]
    cache.select([2, 0])
    for at, row in enumerate((2, 0)):
        begin = pads[row][0]
        found = logits[row, begin : begin + len(rows[row])]
        assert difference(found, expected(model, rows[row], cache, at)) <= EXACT


@BITS
@pytest.mark.parametrize("pads", [((0, 0), (0, 0)), ((7, 0), (0, 2)), ((0, 4), (3, 0))])
def test_a_row_is_copied(mini: CausalLM, bits: int, pads: tuple[tuple[int, int], ...]) -> None:
    rows = [tokens(mini, 30 - sum(pad), seed) for seed, pad in enumerate(pads)]
    both = list(zip(rows, pads, strict=True))
    padded = [[0] * before + row + [0] * after for row, (before, after) in both]
    mask = [[0] * before + [1] * len(row) + [0] * after for row, (before, after) in both]
    cache = mini.make_cache(kv_bits=bits)
    mini(mx.array(padded), cache, mx.array(mask) if any(map(any, pads)) else None)
    for row, (given, (before, _)) in enumerate(both):
        found = cache.row(row, 20)
        found.part()
        assert found.tokens is not None
        assert (found.tokens.tolist(), found.row_lengths) == ([given[:20]], (20,))
        assert found.store.columns == 20
        for mine, whole in zip(found.store.arrays, cache.store.arrays, strict=True):
            assert mx.array_equal(mine[0], whole[row, :, before : before + 20])
        mini(mx.array([given[20:]]), found)  # which leaves the others alone
        for mine, whole in zip(found.store.arrays, cache.store.arrays, strict=True):
            assert mine.shape[0] == 1
            assert whole.shape[0] == 2
        expected(mini, given[:20], cache.row(row, 20), 0)


@BITS
@pytest.mark.parametrize("lengths", [(40, 23), (9, 60)])
def test_caches_are_joined(model: CausalLM, bits: int, lengths: tuple[int, int]) -> None:
    rows = [tokens(model, length, seed) for seed, length in enumerate(lengths)]
    cache, other = (model.make_cache(kv_bits=bits) for _ in rows)
    for each, row in zip((cache, other), rows, strict=True):
        fed(model, row, each, 60)
    cache.join(other)
    assert (other.nbytes, other.length) == (0, 0)
    logits = model(mx.array([[7], [8]]), cache)
    for at, new in enumerate((7, 8)):
        wanted = expected(model, [*rows[at], new], cache, at)
        assert difference(logits[at, -1], wanted[-1]) <= EXACT
    cache.select([1])  # padding that nobody needs goes
    logits = model(mx.array([[9]]), cache)
    assert difference(logits[0, -1], expected(model, [*rows[1], 8, 9], cache)[-1]) <= EXACT


@BITS
@pytest.mark.parametrize("draft", [1, 4, FEW + 4])
def test_a_draft_that_is_taken_back_leaves_nothing(model: CausalLM, bits: int, draft: int) -> None:
    """Every buffer is, bit by bit, what it is without the draft."""
    ids, other = tokens(model, 60), tokens(model, 60, 9)
    caches = [model.make_cache(60, kv_bits=bits) for _ in range(2)]
    for cache in caches:
        fed(model, ids[:40], cache, 40)
    fed(model, other[:draft], caches[0], draft)
    caches[0].trim(40)
    logits = [fed(model, ids[40:46], cache, 3) for cache in caches]
    assert mx.array_equal(*logits)
    for one, two in zip(*(cache.store.arrays for cache in caches), strict=True):
        assert mx.array_equal(one[:, :, :46], two[:, :, :46])


def test_a_draft_across_the_step_is_taken_back(mini: CausalLM) -> None:
    ids, cache = tokens(mini, 40), mini.make_cache(kv_bits=8)
    fed(mini, ids[:30], cache, 30)
    fed(mini, ids[30:36], cache, 6)
    assert cache.long == (True,)
    cache.trim(31)
    logits = fed(mini, ids[31:32], cache, 1)
    assert cache.long == (False,)
    assert difference(logits[-1], expected(mini, ids[:32], cache)[-1]) <= EXACT


@BITS
@pytest.mark.parametrize("count", [2, 5, FEW, FEW + 1, 20])
def test_tokens_of_a_draft_are_those_of_single_steps(mini: CausalLM, bits: int, count: int) -> None:
    ids = tokens(mini, 64, 4)
    cache = mini.make_cache(64, kv_bits=bits)
    fed(mini, ids[:40], cache, 40)
    at_once = fed(mini, ids[40 : 40 + count], cache, count)
    wanted = expected(mini, ids[: 40 + count], cache)[40:]
    cache.trim(40)
    single = fed(mini, ids[40 : 40 + count], cache, 1)
    assert difference(at_once, wanted) <= EXACT
    assert difference(single, expected(mini, ids[: 40 + count], cache)[40:]) <= EXACT
    assert mx.array_equal(mx.argmax(at_once, axis=-1), mx.argmax(single, axis=-1))


# The two ways to attend


def through(array: mx.array, bits: int) -> mx.array:
    packed, scales, biases = mx.quantize(array, 64, bits)
    return mx.dequantize(packed, scales, biases, 64, bits)


@BITS
@pytest.mark.parametrize("length", [1, 3, FEW])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [2, 6])
def test_products_with_the_quantized_form_are_attention(
    bits: int, length: int, masked: bool, heads: int
) -> None:
    key = mx.random.key(length)
    queries = mx.random.normal((2, heads, length, 128), key=key)
    keys, values = mx.random.normal((2, 2, 2, 100, 128), key=key)
    store = QuantizedStore(1, bits, 128)
    store.reserve(300, 0)
    store.attend(0, 0, queries, keys[:, :, :-length], values[:, :, :-length], None)
    mask: Any = "causal" if length > 1 else None
    if masked:
        mask = mx.random.bernoulli(0.5, (2, 1, length, 100), key=key) | mx.eye(
            length, 100, 3, mx.bool_
        )
    found = store.attend(
        0, 100 - length, queries, keys[:, :, -length:], values[:, :, -length:], mask
    )
    both = [through(array, bits) for array in (keys, values)]
    wanted = attention(queries, both[0], both[1], mask)
    assert mx.abs(found - wanted).max().item() < 2e-6 * mx.abs(wanted).max().item() + 1e-6


def test_heads_that_the_kernel_leaves_in_part_are_dequantized() -> None:
    """mlx#4250: on Metal, channels beyond a multiple of 64 are never computed."""
    assert QuantizedStore(1, 8, 128)._multiplies
    assert QuantizedStore(1, 8, 64)._multiplies
    assert not QuantizedStore(1, 8, 96)._multiplies
    assert not QuantizedStore(1, 8, 32)._multiplies


@pytest.mark.parametrize(
    ("head_dim", "group"), [(128, 64), (64, 64), (96, 32), (32, 32), (80, None), (16, None)]
)
def test_groups_divide_heads(head_dim: int, group: int | None) -> None:
    assert kv_group_size(head_dim) == group
    if group is None:
        with pytest.raises(GenerationError) as caught:
            make_store(1, head_dim, 8)
        assert str(caught.value) == (
            f"This model's heads have {head_dim} channels, which groups of 32 do not divide, so "
            "its keys and values cannot be quantized."
        )
        assert caught.value.hint == "Leave kv_bits (--kv-bits) out."
        return
    store = make_store(1, head_dim, 4)
    store.reserve(256, 0)
    keys = mx.zeros((1, 2, 3, head_dim), mx.bfloat16)
    store.attend(0, 0, keys, keys, keys, "causal")
    nbytes = sum(array.nbytes for array in store.arrays)
    assert nbytes == 2 * 2 * 256 * head_dim * kv_bytes_per_value(head_dim, 2, 4)


@pytest.mark.parametrize("bits", [0, 3, 16, True, "8", 8.5])
def test_bits_that_there_are_not(bits: Any) -> None:
    with pytest.raises(GenerationError) as caught:
        make_store(1, 128, bits)
    assert str(caught.value) == f"kv_bits is {bits!r}; it must be 8 or 4, or None for neither."


# Memory

LAYERS, COLUMNS = 16, 4096


def filled(kv_bits: int | None) -> Store:
    """A store of `LAYERS` layers, full to the last column."""
    store = make_store(LAYERS, 64, kv_bits)
    store.reserve(COLUMNS, 0)
    new = mx.random.normal((2, 2, COLUMNS, 64), key=mx.random.key(0))
    parts = [new, new]
    if kv_bits is not None:
        parts = [part for array in parts for part in mx.quantize(array, 64, kv_bits)]
    for layer in range(LAYERS):
        store.write(layer, 0, [part + layer for part in parts])
        mx.eval(store.arrays)
    return store


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
@pytest.mark.parametrize("change", ["reserve", "select"])
def test_two_copies_of_all_layers_are_never_held(kv_bits: int | None, change: str) -> None:
    store = filled(kv_bits)
    before = [np.array(array[:, :, -1]) for array in store.arrays]
    nbytes = sum(array.nbytes for array in store.arrays)
    mx.synchronize()
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    if change == "reserve":
        store.reserve(COLUMNS + 1, COLUMNS)
    else:
        store.select([1, 0])
    mx.eval(store.arrays)
    mx.synchronize()
    grown = sum(array.nbytes for array in store.arrays) - nbytes
    assert mx.get_peak_memory() - held <= grown + 2.5 * nbytes / LAYERS
    for array, last in zip(store.arrays, before, strict=True):
        rows = last if change == "reserve" else last[::-1]
        np.testing.assert_array_equal(np.array(array[:, :, COLUMNS - 1]), rows)


def test_a_prompt_in_pieces_has_room_for_all_of_it_from_the_first_on(mini: CausalLM) -> None:
    cache = mini.make_cache(600)
    sizes = []
    for begin in range(0, 600, 200):
        mini(mx.array([tokens(mini, 200, begin)]), cache)
        sizes.append(cache.nbytes)
    assert sizes == [2 * 2 * 768 * 128 * 4] * 3
    cache.trim(0)
    assert cache.nbytes == 0


def test_a_prompt_attends_over_few_layers_dequantized_at_a_time() -> None:
    store, length = filled(4), FEW + 1
    x = mx.random.normal((2, 2, length, 64), key=mx.random.key(1))
    mx.eval(x)
    mx.synchronize()
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    begin = COLUMNS - length
    for layer in range(LAYERS):
        x = x + store.attend(layer, begin, x, x, x, "causal")
    mx.eval(x)
    one = 2 * 2 * 2 * COLUMNS * 64 * 4  # keys and values of a layer
    scores = 2 * 2 * length * COLUMNS * 4
    assert mx.get_peak_memory() - held < 2.5 * one + 6 * scores < LAYERS * one / 4
