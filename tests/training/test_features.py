"""The store of features: whose files make room, and a limit that several processes keep."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx

from phimlx.training.data.media import MediaItem
from phimlx.training.features import FeatureStore

ROWS = mx.zeros((4, 250))  # 4,000 bytes, and what says so
LONG_AGO = 1_000_000_000


def item(number: int) -> MediaItem:
    return MediaItem("audio", number.to_bytes(2, "big"), 4, None)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_what_was_used_longest_ago_makes_room_and_nothing_of_this_run(tmp_path: Path) -> None:
    notes: list[str] = []
    before = FeatureStore("model", 100_000, folder=tmp_path)
    for number in range(3):
        before.write(item(number), ROWS)
    for path in tmp_path.iterdir():
        os.utime(path, (LONG_AGO, LONG_AGO))
    room = size_of(tmp_path) + 100
    store = FeatureStore("model", room, notes.append, tmp_path)
    assert store.read(item(1)) is not None
    for number in (7, 8):
        store.write(item(number), ROWS)
    assert size_of(tmp_path) <= room
    assert [number for number in (0, 1, 2, 7, 8) if store.read(item(number)) is not None] == [
        1,
        7,
        8,
    ]
    assert notes == []
    store.write(item(9), ROWS)
    assert store.read(item(9)) is None
    assert notes == [
        "From here on the store of features is full; raise its limit with --feature-store."
    ]


def test_several_processes_keep_one_limit(tmp_path: Path) -> None:
    limit = 200_000
    stores = [FeatureStore("model", limit, folder=tmp_path) for _ in range(4)]
    for number in range(80):
        stores[number % 4].write(item(number), ROWS)
        assert size_of(tmp_path) <= limit
    assert size_of(tmp_path) > 0.9 * limit
    assert stores[0].read(item(1)) is not None
