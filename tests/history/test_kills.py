"""Processes that are killed while they write: the script for it, with few of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.history_kills import run


@pytest.mark.slow
def test_what_was_kept_survives_kills(tmp_path: Path) -> None:
    assert run(tmp_path / "history.db", kills=8, seed=1, timed=False) > 0
