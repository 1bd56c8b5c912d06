"""One server for all tests that change nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from phimlx import api
from phimlx.api import Phi, load
from tests.server.running import Running, running
from tests.server.scripted import Scripted, tokens_of

Say = Callable[[str], None]


@pytest.fixture(scope="session")
def nano() -> Phi:
    """The model that the server has too, alone."""
    return load("nano")


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with running() as started:
        yield started


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, nano: Phi) -> Say:
    """Writes the replies of nano beforehand, to one request at a time."""

    def use(text: str) -> None:
        monkeypatch.setattr(api, "Sampler", partial(Scripted, tokens_of(nano, text)))

    return use
