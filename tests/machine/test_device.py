"""Sizes that depend on the device follow the default device, whenever it is set."""

from __future__ import annotations

import mlx.core as mx
import pytest

from phimlx import catalog
from phimlx.machine.device import crops_at_once, on_gpu, prefill_tokens
from phimlx.machine.memory import footprint, longest_context, picture_bytes
from phimlx.models.phi4mm.config import VisionConfig


def sizes() -> tuple[int, ...]:
    shape, vision = catalog.DEFAULT, VisionConfig.from_dict({})
    return (
        footprint(shape, 0, 4096).working,
        -longest_context(shape, 0, 16_000_000_000),
        picture_bytes(vision, 36),
    )


def test_a_device_chosen_after_import_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # MLX lets nobody choose a GPU where there is none.
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu, 0))
    assert (on_gpu(), prefill_tokens(), crops_at_once()) == (False, 512, 1)
    before = sizes()
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    assert (on_gpu(), prefill_tokens(), crops_at_once()) == (True, 2048, 4)
    assert all(now > then for now, then in zip(sizes(), before, strict=True))
