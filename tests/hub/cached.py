"""Models in a cache of huggingface_hub's, put there by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub.loopback_hub import COMMIT

QUANTIZED = "mlx-community/Phi-4-mini-instruct-4bit"
ORIGINAL = "microsoft/Phi-4-mini-instruct"
OTHER_COMMIT = "f" * 40


def use_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty cache, and a working folder that holds nothing."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def keep(cache: Path, repo: str, commit: str = COMMIT, main: bool = True, **files: str) -> Path:
    """Put a whole model into the cache, as huggingface_hub does; `files` replaces some."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    contents = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": "x", **files}
    for name, text in contents.items():
        if text:
            (snapshot / name).write_text(text)
    if main:
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text(commit)
    return snapshot
