"""What a server has read of a long prompt, another one after it need not read again."""

from __future__ import annotations

import asyncio
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

from phimlx.api import Phi
from tests.generation.small import words
from tests.server.running import running

PROMPT = [each % 1000 + 3 for each in words(300)]


@pytest.fixture
def shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own, for prompts of a length that nano has room for."""
    keep = partialmethod(Phi.prefix_store, folder=tmp_path / "kept", min_tokens=257)
    monkeypatch.setattr(Phi, "prefix_store", keep)
    return tmp_path / "kept"


def ask(**settings: Any) -> tuple[str, int]:
    """Ask a new server, which is told to keep what it has; the reply, and what it had."""
    with running(model="nano", **settings) as server:
        body = {"model": "nano", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        found = server.post("/v1/completions", body).json()
        cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
        saving = server.app.service.models.save_prefixes()
        worker = server.app.service.worker
        asyncio.run_coroutine_threadsafe(saving, worker.loop).result(60)
        return found["choices"][0]["text"], cached


def test_a_prompt_is_read_once_by_one_server_after_another(shorter: Path) -> None:
    first, cached = ask()
    assert (cached, len(list(shorter.iterdir()))) == (0, 1)
    assert ask() == (first, len(PROMPT) - 1)


def test_nothing_is_kept_where_that_is_said(shorter: Path) -> None:
    first, _ = ask(no_cache=True)
    assert not shorter.exists()
    assert ask(no_cache=True) == (first, 0)
