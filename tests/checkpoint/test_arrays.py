"""Arrays on disk: as MLX writes them, and the disk's own errors where it cannot."""

from __future__ import annotations

import errno
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors import safe_open

from phimlx.checkpoint.arrays import write_arrays
from phimlx.errors import CheckpointError
from phimlx.files import translate_write_errors

FULL = Path("/dev/full")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    arrays = {"a": mx.arange(6).reshape(2, 3), "b": mx.ones((4,), mx.bfloat16)}
    write_arrays(tmp_path / "x.safetensors", arrays)
    with safe_open(str(tmp_path / "x.safetensors"), framework="numpy") as opened:
        assert opened.metadata() == {"format": "mlx"}
        assert sorted(opened.keys()) == ["a", "b"]
        assert opened.get_tensor("a").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert opened.get_slice("b").get_dtype() == "BF16"


@pytest.mark.skipif(not FULL.exists(), reason="a disk that is always full is Linux's")
def test_a_full_disk_is_told() -> None:
    with pytest.raises(OSError, match="space") as caught:
        write_arrays(FULL, {"a": mx.zeros((100_000,))})
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(CheckpointError) as told, translate_write_errors(FULL, CheckpointError):
        write_arrays(FULL, {"a": mx.zeros((100_000,))})
    assert str(told.value) == "The disk is full: /dev/full could not be written."
