"""One server for all tests that change nothing of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from phimlx.api import Phi, load
from tests.server.running import Running, running


@pytest.fixture(scope="session")
def nano() -> Phi:
    """The model that the server has too, alone."""
    return load("nano")


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with running() as started:
        yield started
