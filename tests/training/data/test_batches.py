"""Batches: every example once, little padding, few shapes, the same order for the same seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phimlx.training.data.batches import Batches, Example, pack, rounded


def example(length: int, name: int = 0) -> Example:
    """Feeds `length` tokens, whose ids tell which example and which place they are."""
    tokens = np.arange(length + 1, dtype=np.int32) + 10_000 * name
    return Example(tokens, np.arange(length + 1) % 3 != 0, f"row {name}")


def chat_lengths(count: int) -> list[int]:
    """Log-normal, as the lengths of chats are."""
    drawn = np.exp(np.random.default_rng(0).normal(5.3, 0.8, count))
    return np.clip(drawn.astype(int), 8, 2047).tolist()


def examples(lengths: list[int]) -> list[Example]:
    return [example(length, name) for name, length in enumerate(lengths)]


@pytest.mark.parametrize("batch_size", [1, 4, 8, 16])
def test_padding_of_chats_stays_below_six_percent(batch_size: int) -> None:
    batches = Batches(examples(chat_lengths(2000)), batch_size, seed=0)
    assert batches.real_share >= 0.94
    fed = real = 0
    for batch in batches.epoch(3):
        fed += batch.tokens.size
        real += batch.real_tokens
    assert real / fed >= 0.94


def test_packed_rows_are_at_least_95_percent_real_and_of_one_shape() -> None:
    batches = Batches(examples(chat_lengths(2000)), 4, row_length=2048, seed=0)
    assert batches.real_share >= 0.95
    assert {batch.tokens.shape for batch in batches.epoch(0)} == {(4, 2048)}


def test_shapes_are_few() -> None:
    batches = Batches(examples(chat_lengths(5000)), 8, seed=0)
    assert len({batch.tokens.shape for batch in batches.epoch(0)}) <= 110


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
    packed=st.booleans(),
    seed=st.none() | st.integers(0, 5),
    ranks=st.integers(1, 3),
)
def test_every_example_comes_once_an_epoch(
    lengths: list[int], batch_size: int, packed: bool, seed: int | None, ranks: int
) -> None:
    data = examples(lengths)
    seen: Counter[str] = Counter()
    targets: Counter[int] = Counter()
    for rank in range(ranks):
        batches = Batches(
            data,
            batch_size,
            row_length=64 if packed else None,
            seed=seed,
            rank=rank,
            ranks=ranks,
        )
        given_batches = list(batches.epoch(1))
        assert len(given_batches) == len(batches)
        for batch in given_batches:
            seen.update(batch.sources)
            real = batch.weights > 0
            targets.update(batch.targets[real].tolist())
            fed = batch.tokens.reshape(-1)[batch.target_indices[real]]
            # A place feeds the token before its target, and its position is that token's.
            assert (fed + 1 == batch.targets[real]).all()
            assert (batch.positions.reshape(-1)[batch.target_indices[real]] == fed % 10_000).all()
            for number, source in enumerate(batch.sources):
                wanted = data[int(source.split()[1])]
                owned = batch.example_ids[real] == number
                assert owned.sum() == wanted.supervised[1:].sum()
            assert len(batch.target_indices) % 128 == 0
    assert seen == Counter(each.source for each in data)
    assert targets == Counter(t for each in data for t in each.tokens[1:][each.supervised[1:]])


def test_order_follows_from_seed_and_epoch_and_can_start_anywhere() -> None:
    data = examples(chat_lengths(100))

    def order(seed: int, epoch: int, start: int = 0) -> list[tuple[str, ...]]:
        return [batch.sources for batch in Batches(data, 4, seed=seed).epoch(epoch, start)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(1, 2, 7) == order(1, 2)[7:]


def test_machines_share_each_batch_of_one() -> None:
    data = examples(chat_lengths(64))
    whole = Batches(data, 8, seed=3).epoch(0)
    parts = zip(*(Batches(data, 8, seed=3, rank=r, ranks=2).epoch(0) for r in (0, 1)), strict=True)
    for together, (first, second) in zip(whole, parts, strict=True):
        assert sorted(together.sources) == sorted(first.sources + second.sources)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=80))
def test_packing_wastes_little_and_overfills_nothing(lengths: list[int]) -> None:
    lengths.sort(reverse=True)
    rows = pack(lengths, 100, range(len(lengths)))
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 100 for row in rows)
    # Best-fit decreasing never needs more than 11/9 of the best packing, and 6/9 of a bin.
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 100) + 6 / 9 or len(rows) <= sum(
        length > 33 for length in lengths
    )


@given(st.integers(1, 1 << 20), st.sampled_from([8, 128]))
def test_rounding_adds_at_most_a_sixteenth(size: int, smallest: int) -> None:
    up = rounded(size, smallest)
    assert size <= up < size + max(smallest, size / 16 + 1)
    assert up % smallest == 0
