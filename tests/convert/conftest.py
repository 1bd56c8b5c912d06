"""What every test of conversion needs."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """Bits are compared, and each kind of device rounds in its own way."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)
