"""A model's fingerprint, which decides whether a run may go on, tells every change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from phimlx.hub import content_hash
from phimlx.training.run.session import fingerprint


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(content_hash, "cache_file", lambda: tmp_path / "hashes.json")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "phi3"}')
    (folder / "tokenizer.json").write_text("{}")
    mx.save_safetensors(str(folder / "model.safetensors"), {"a": mx.zeros(2 << 20)})
    return folder


def flip_the_middle(folder: Path) -> None:
    """Change one bit, 4 MB from both ends of the weights."""
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(4 << 20)
        file.write(b"\x01")


@pytest.mark.parametrize(
    "change",
    [
        flip_the_middle,
        lambda folder: (folder / "config.json").write_text('{"model_type":  "phi3"}'),
        lambda folder: (folder / "tokenizer.json").write_text("[]"),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "model.safetensors").rename(folder / "model-1.safetensors"),
    ],
)
def test_every_change_is_told(model: Path, change: Callable[[Path], object]) -> None:
    before = fingerprint(model)
    copy = shutil.copytree(model, model.with_name("copy"))
    assert fingerprint(copy) == before
    change(copy)
    assert fingerprint(copy) != before
    assert fingerprint(model) == before
