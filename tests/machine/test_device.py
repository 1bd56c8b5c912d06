"""Sizes that depend on the device follow the default device, whenever it is set."""

from __future__ import annotations

import mlx.core as mx
import pytest

from phimlx import catalog
from phimlx.machine import device, doctor
from phimlx.machine.bandwidth import PUBLISHED
from phimlx.machine.device import crops_at_once, emulates_bfloat16, on_gpu, prefill_tokens
from phimlx.machine.doctor import Finding
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


@pytest.mark.parametrize(
    ("backend", "name", "emulates"),
    [("metal", f"Apple {chip}", chip[:2] in ("M1", "M2")) for chip in PUBLISHED]
    + [("metal", "Apple M10", False), ("cpu", "Apple M1", False), ("cuda", "NVIDIA H200", False)],
)
def test_chips_that_emulate_bfloat16(
    backend: str, name: str, emulates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "backend", lambda: backend)
    monkeypatch.setattr(device, "device_name", lambda: name)
    assert emulates_bfloat16() is emulates
    if backend == "metal":
        hint = (
            "This chip emulates bfloat16: with --dtype float16 a model that is stored in it reads "
            "prompts quicker."
        )
        assert doctor._backend() == Finding(
            "backend", f"Metal, {name}", hint=hint if emulates else None
        )
