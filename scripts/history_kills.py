#!/usr/bin/env python3
"""Kills chats at random moments, and looks whether the history is whole and has lost nothing.

    python scripts/history_kills.py --kills 100

Two processes talk at a time, each in conversations of its own, and name what has been kept. One is
killed (SIGKILL) after a random time, be it while it opens the database, the other after a random
number of turns, as it begins the next.
"""

from __future__ import annotations

import argparse
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from phimlx.history.records import Head, Place
from phimlx.history.store import History

MOST_TURNS = 12  # before a kill
MOST_SECONDS = 1.0


def talk(path: Path) -> None:
    """Ask and answer without end, deleting a conversation now and then; name what is kept."""
    with History(path) as history:
        while True:
            place: Place | None = None
            said: list[dict[str, str]] = []
            for turn in range(6):
                for role in ("user", "assistant"):
                    said.append({"role": role, "content": f"{role} {turn} " + "word " * 200})
                    place = history.put(place, Head("nano"), said)
                    print(place.id, len(said), flush=True)
            if place is not None and place.id % 3 == 0:
                print(place.id, 0, flush=True)  # gone from here on, or still there
                history.delete(place.id)


def start(path: Path) -> subprocess.Popen[str]:
    """Start a process that talks."""
    command = [sys.executable, __file__, "--talk", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def follow(
    process: subprocess.Popen[str], kept: dict[int, int], turns: int, seconds: float | None
) -> None:
    """Kill a process after so many lines or seconds; note what it has said was kept."""
    timer = threading.Timer(seconds or 0.0, process.kill)
    if seconds is not None:
        timer.start()
    assert process.stdout is not None
    for count, line in enumerate(process.stdout):
        if not line.endswith("\n"):  # cut off by the kill
            break
        id, messages = map(int, line.split())
        kept[id] = messages
        if count == turns and seconds is None:
            process.kill()
    process.wait()
    timer.cancel()


def check(path: Path, kept: dict[int, int]) -> None:
    """Raise AssertionError for a database that is not whole, or has lost what was kept."""
    with History(path) as history:
        found = {each.id: each.messages for each in history.conversations()}
        for id, messages in kept.items():
            assert found.get(id, 0) >= messages, f"conversation {id} has lost messages"
            assert id not in found or len(history.read(id).messages) == found[id]
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert raw.execute("PRAGMA foreign_key_check").fetchall() == []
        raw.execute("INSERT INTO message_index(message_index) VALUES ('integrity-check')")
    raw.close()


def run(path: Path, kills: int, seed: int, timed: bool = True) -> int:
    """Kill so many chats; return how many messages had been kept."""
    chance, kept = random.Random(seed), dict[int, int]()
    for _ in range(0, kills, 2):
        processes = [start(path) for _ in range(2)]
        threads = [
            threading.Thread(target=follow, args=(each, kept, turns, seconds))
            for each, turns, seconds in zip(
                processes,
                (chance.randrange(MOST_TURNS), 0),
                (None, chance.uniform(0, MOST_SECONDS) if timed else None),
                strict=True,
            )
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check(path, kept)
    return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--talk", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.talk:
        talk(arguments.talk)
        return
    with tempfile.TemporaryDirectory() as folder:
        kept = run(Path(folder) / "history.db", arguments.kills, arguments.seed)
    print(f"{arguments.kills} kills: the database is whole, none of {kept:,} kept messages is lost")


if __name__ == "__main__":
    main()
